"""Losses and counts, and their sums over steps, kept on the device and divided once."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

NO_STEP = 2**31 - 1
"""The value of ``Metrics.first_nonfinite_step`` while all steps are finite."""


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each example: logits float32 ``[B, classes]`` and labels int32 ``[B]`` to float32 ``[B]``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def num_correct(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The number of unmasked examples whose largest logit is their label's, an int32 scalar."""
    return jnp.sum(logits.argmax(axis=-1) == labels, where=mask, dtype=jnp.int32)


@struct.dataclass
class Metrics:
    """The sums over the training steps of an epoch; every field is a scalar on the device.

    Attributes:
        loss: float32, sum of the batches' mean losses, as in the lesson's loop.
        num_correct: int32, examples predicted correctly, each before the update it took part in.
        num_examples: int32, examples seen, without padding.
        first_nonfinite_step: int32, the first step whose loss or new parameters were not finite, or ``NO_STEP``.
    """

    loss: jax.Array
    num_correct: jax.Array
    num_examples: jax.Array
    first_nonfinite_step: jax.Array

    @classmethod
    def zero(cls) -> "Metrics":
        """The sum over no steps."""
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(NO_STEP))

    @classmethod
    def from_numbers(cls, numbers: dict[str, float]) -> "Metrics":
        """The metrics that ``to_numbers`` gave, to the bit."""
        zero = cls.zero()
        return cls(**{name: jnp.asarray(value, getattr(zero, name).dtype) for name, value in numbers.items()})

    def to_numbers(self) -> dict[str, float]:
        """The fields as Python's numbers, for JSON."""
        return {name: value.item() for name, value in vars(jax.device_get(self)).items()}

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(
            loss=self.loss + other.loss,
            num_correct=self.num_correct + other.num_correct,
            num_examples=self.num_examples + other.num_examples,
            first_nonfinite_step=jnp.minimum(self.first_nonfinite_step, other.first_nonfinite_step),
        )
