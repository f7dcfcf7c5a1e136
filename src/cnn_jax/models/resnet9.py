"""The small residual network of the speed runs on CIFAR-10."""

import flax.linen as nn
import jax

from cnn_jax.models.classifier import ImageClassifier
from cnn_jax.models.conv import Conv, max_pool
from cnn_jax.models.layers import BatchContext, BatchNorm


class ResNet9(ImageClassifier):
    """David Page's ResNet-9, which led DAWNBench's CIFAR-10 list (https://github.com/davidcpage/cifar10-fast).

    Nine layers: eight 3x3 convolutions, each with batch normalization and ReLU, of which two pairs are residual blocks,
    and a linear layer. 6,573,130 parameters with color images and ten classes. Unlike the original, the linear layer
    has a bias, and images may have any size from 8x8, because the last pooling is global.
    """

    NAME = "resnet9"
    HEAD = "linear"
    MIN_SIDE = 8  # three times halved

    def backbone(self, images: jax.Array, batch: BatchContext | None) -> jax.Array:
        """Images ``[N, H, W, C]`` to features ``[N, 512]``."""
        x = _ConvNorm(64, self.portable, name="prep")(images, batch)
        x = _Layer(128, True, self.portable, name="layer1")(x, batch)
        x = _Layer(256, False, self.portable, name="layer2")(x, batch)
        x = _Layer(512, True, self.portable, name="layer3")(x, batch)
        # The original scales the logits instead, which has the same effect on the linear layer's matrix.
        return 0.125 * x.max((1, 2))


class _Layer(nn.Module):
    """A convolution, 2x2 max-pooling, and if asked for a residual block of two convolutions."""

    features: int
    residual: bool
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        x = max_pool(_conv_norm(self.features, self.portable, x, batch))
        return _Residual(self.features, self.portable, name="residual")(x, batch) if self.residual else x


class _Residual(nn.Module):
    features: int
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        y = _ConvNorm(self.features, self.portable, name="res1")(x, batch)
        return x + _ConvNorm(self.features, self.portable, name="res2")(y, batch)


class _ConvNorm(nn.Module):
    features: int
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        return _conv_norm(self.features, self.portable, x, batch)


def _conv_norm(features: int, portable: bool, x: jax.Array, batch: BatchContext | None) -> jax.Array:
    """A 3x3 convolution, batch normalization and ReLU, as layers of the calling module."""
    x = Conv(features, (3, 3), "SAME", portable=portable, use_bias=False, name="conv")(x)
    return nn.relu(BatchNorm(portable=portable, name="bn")(x, batch))
