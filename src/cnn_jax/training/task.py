"""What does not change during training: model, optimizer, loss and preprocessing."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax.models.layers import BatchContext
from cnn_jax.training.augment import Augment
from cnn_jax.training.metrics import CrossEntropy
from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.precision import Precision, compute_in, matmul_precision
from cnn_jax.training.state import Params, TrainState, Variables
from cnn_jax.training.views import TestTimeAugmentation, views


@dataclass(frozen=True)
class Normalize:
    """Scales uint8 images ``[..., C]`` to float32 in [0, 1], then standardizes each channel.

    This is torchvision's ``ToTensor`` and ``Normalize``. By default it only scales.

    Attributes:
        mean: subtracted from each channel.
        std: divides each channel after that.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Convert images."""
        scaled = images.astype(jnp.float32) / 255
        if self == SCALE:  # the lesson's numbers, without another rounding error
            return scaled
        # Explicitly, so that it also works with jax_numpy_rank_promotion="raise".
        mean, std = (jnp.broadcast_to(jnp.float32(values), scaled.shape) for values in (self.mean, self.std))
        return (scaled - mean) / std


SCALE = Normalize()
"""The lesson's preprocessing: no standardization."""


@dataclass(frozen=True)
class Task:
    """A hashable value that is static to ``jax.jit``: runs with equal tasks share compiled programs.

    Attributes:
        model: maps float32 images ``[B, H, W, C]``, and a ``BatchContext`` in training, to logits ``[B, classes]``.
        optimizer: turns gradients into updates of the parameters.
        loss: maps logits ``[B, classes]`` and labels ``[B]`` to the loss of each example ``[B]``.
        preprocess: maps uint8 images to the model's input, in training and inference.
        augment: changes the training images at random.
        tta: the views of each image whose logits are averaged in inference.
        average_decay: decay of the exponential moving average of the parameters, or None for no average.
        precision: the precision of matrix products and convolutions.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: CrossEntropy = CrossEntropy()  # noqa: RUF009 (frozen)
    preprocess: Normalize = SCALE
    augment: Augment = Augment()  # noqa: RUF009 (frozen)
    tta: TestTimeAugmentation = "none"
    average_decay: float | None = None
    precision: Precision = "default"

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> TrainState:
        """Create the state at step 0.

        Args:
            key: determines the initial parameters.
            image_shape: ``(H, W, C)``.

        Raises:
            UsageError: the images are too small for the model.
        """
        model_state = self.model.init(key, jnp.zeros((1, *image_shape)))
        params = model_state.pop("params")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=self.optimizer.init(params),
            averaged_params=None if self.average_decay is None else jax.tree.map(jnp.copy, params),
        )

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Inference: map uint8 images ``[B, H, W, C]`` to logits float32 ``[B, classes]``."""
        if self.tta == "none":
            return self._apply(variables, images)
        stacked, weights = views(images, self.tta)
        logits = self._apply(variables, stacked.reshape(-1, *images.shape[1:]))
        logits = logits.reshape(len(weights), -1, logits.shape[-1])
        return jnp.tensordot(jnp.asarray(weights), logits, axes=1, precision="highest")

    def train_logits(
        self, params: Params, model_state: Variables, images: jax.Array, context: BatchContext, key: jax.Array
    ) -> tuple[jax.Array, Variables]:
        """The forward pass in training.

        Args:
            params: the model's parameters.
            model_state: the model's other collections.
            images: uint8 ``[B, H, W, C]``, augmented.
            context: the position of the images in the whole batch, and their mask.
            key: determines dropout, together with the positions of the images in the batch.

        Returns:
            The logits float32 ``[B, classes]``, and the updated collections.
        """
        variables = {"params": params, **model_state}
        return self._apply(variables, images, context, mutable=list(model_state), rngs={"dropout": key})

    def _apply(self, variables: Variables, images: jax.Array, *args: Any, **options: Any) -> Any:
        """Apply the model to uint8 images with the chosen precision."""
        variables, images = compute_in(self.precision, variables, self.preprocess(images))
        with matmul_precision(self.precision):
            return self.model.apply(variables, images, *args, **options)
