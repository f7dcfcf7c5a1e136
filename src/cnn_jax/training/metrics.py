"""Loss and accuracy, accumulated over steps on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

NO_STEP = 2**31 - 1
"""Value of ``Metrics.first_nonfinite_step`` if all steps are finite."""


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each example. By default it is the cross-entropy.

    Attributes:
        label_smoothing: the part of the target probability that is spread over all classes (Szegedy et al.,
            https://arxiv.org/abs/1512.00567), as in ``torch.nn.CrossEntropyLoss``.
        class_weights: factor of the loss of the examples of each class, or None. The sum over a batch is divided by
            the number of examples, where PyTorch divides by the sum of their weights.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __call__(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Logits float32 ``[B, classes]`` and labels int32 ``[B]`` to losses float32 ``[B]``."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if self.label_smoothing:
            # Minus the mean log probability, which is the cross-entropy of the uniform distribution.
            uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * uniform
        if self.class_weights is not None:
            losses = losses * jnp.asarray(self.class_weights, losses.dtype)[labels]
        return losses


def balanced_class_weights(labels: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Weights that give every class the same sum, with a mean of 1 over the examples, as scikit-learn's ``"balanced"``.

    Args:
        labels: int ``[N]``.
        num_classes: number of classes.

    Returns:
        A weight per class; 0 for classes without an example.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)) * (counts > 0)
    return tuple(weights.tolist())


def num_correct(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Number of correctly classified examples where the mask is true, an int32 scalar."""
    return jnp.sum(logits.argmax(axis=-1) == labels, where=mask, dtype=jnp.int32)


@struct.dataclass
class Metrics:
    """Sums over training steps of an epoch; every field is a scalar on the device.

    Attributes:
        loss: float32, sum of the batches' mean losses, as in the lesson's loop.
        num_correct: int32, examples correctly classified, each before its batch's update.
        num_examples: int32, number of examples, excluding padding.
        first_nonfinite_step: int32, the first step whose loss or new parameters were not finite, or ``NO_STEP``.
    """

    loss: jax.Array
    num_correct: jax.Array
    num_examples: jax.Array
    first_nonfinite_step: jax.Array

    @classmethod
    def zero(cls) -> "Metrics":
        """The metrics of no steps."""
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(NO_STEP))

    @classmethod
    def from_numbers(cls, numbers: dict[str, float]) -> "Metrics":
        """Convert from the result of ``to_numbers``, without rounding."""
        zero = cls.zero()
        return cls(**{name: jnp.asarray(value, getattr(zero, name).dtype) for name, value in numbers.items()})

    def to_numbers(self) -> dict[str, float]:
        """Convert the fields to Python numbers, for JSON."""
        return {name: value.item() for name, value in vars(jax.device_get(self)).items()}

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(
            loss=self.loss + other.loss,
            num_correct=self.num_correct + other.num_correct,
            num_examples=self.num_examples + other.num_examples,
            first_nonfinite_step=jnp.minimum(self.first_nonfinite_step, other.first_nonfinite_step),
        )
