"""What all architectures have in common: a backbone and a head."""

from typing import ClassVar

import flax.linen as nn
import jax

from cnn_jax.errors import UsageError
from cnn_jax.models.layers import BatchContext, Dense, accumulator_dtype


class ImageClassifier(nn.Module):
    """A backbone, which maps images to features, and a head, a linear layer that maps features to logits.

    An architecture is a subclass with the class attributes and the method ``backbone``. Its fields ``depth``, ``width``
    and ``dropout``, if it has them, are its options.

    Attributes:
        NAME: the architecture's name.
        HEAD: the name of the head among the parameters.
        MIN_SIDE: the minimum height and width of images.
        num_classes: number of logits.
        portable: see ``Conv``.
        freeze_backbone: whether the backbone computes in training what it does in inference, without dropout and with
            the running averages of batch normalization, which it keeps; gradients of its parameters are zero, and its
            backward pass is not computed.
    """

    NAME: ClassVar[str]
    HEAD: ClassVar[str]
    MIN_SIDE: ClassVar[int] = 1

    num_classes: int
    portable: bool = False
    freeze_backbone: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, batch: BatchContext | None = None) -> jax.Array:
        """Float32 images ``[N, H, W, C]`` to float32 logits ``[N, num_classes]``; with ``batch``, in training.

        Raises:
            UsageError: the images are too small.
        """
        height, width = images.shape[1:3]
        if min(height, width) < self.MIN_SIDE:
            raise UsageError(
                f"the network {self.NAME} needs images of at least {self.MIN_SIDE}x{self.MIN_SIDE} pixels, not "
                f"{height}x{width}: use larger images, or resize those of folder:PATH with --image-size, such as "
                "--image-size 64 64"
            )
        if self.freeze_backbone:
            features = jax.lax.stop_gradient(self.backbone(images, None))
        else:
            features = self.backbone(images, batch)
        # Logits of 16 bits would be equal where they should not be.
        return Dense(self.num_classes, dtype=accumulator_dtype(features.dtype), name=self.HEAD)(features)

    def backbone(self, images: jax.Array, batch: BatchContext | None) -> jax.Array:
        """Images ``[N, H, W, C]`` to features ``[N, F]``; called by ``__call__``, so that it can create layers."""
        raise NotImplementedError
