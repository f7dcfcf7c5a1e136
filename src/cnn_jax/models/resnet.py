"""Residual networks with torchvision's structure and the names of its parameters."""

from typing import ClassVar

import flax.linen as nn
import jax

from cnn_jax.models.blocks import conv
from cnn_jax.models.classifier import ImageClassifier
from cnn_jax.models.conv import overlapping_max_pool
from cnn_jax.models.layers import BatchContext, BatchNorm


class ResNet(ImageClassifier):
    """He et al., "Deep residual learning for image recognition" (https://arxiv.org/abs/1512.03385), as in torchvision.

    Joined by dots, the names of the parameters and statistics are those of torchvision's state_dict, for example
    ``layer2.0.downsample.1.bias``, with ``kernel`` and ``scale`` for its ``weight``, and ``mean`` and ``var`` for its
    ``running_mean`` and ``running_var``. They are initialized from the same distributions
    (https://docs.pytorch.org/vision/stable/models/resnet.html).

    The feature maps of the last stage are 1/32 of the image's height and width, rounded up.

    Attributes:
        BLOCKS: number of blocks in each of the four stages.
        BOTTLENECK: whether a block is 1x1, 3x3 and 1x1 convolutions, rather than two of 3x3.
    """

    HEAD = "fc"
    MIN_SIDE = 16  # with less, two stages of four would see a single pixel, and padding
    BLOCKS: ClassVar[tuple[int, ...]]
    BOTTLENECK: ClassVar[bool] = False

    def backbone(self, images: jax.Array, batch: BatchContext | None) -> jax.Array:
        """Images ``[N, H, W, C]`` to features ``[N, 512]``, or ``[N, 2048]`` from bottlenecks."""
        x = conv(64, 7, 2, self.portable, "conv1")(images)
        x = overlapping_max_pool(nn.relu(BatchNorm(portable=self.portable, name="bn1")(x, batch)))
        for stage, blocks in enumerate(self.BLOCKS):
            stride = 1 if stage == 0 else 2
            layer = _Stage(blocks, 64 * 2**stage, stride, self.BOTTLENECK, self.portable, name=f"layer{stage + 1}")
            x = layer(x, batch)
        return x.mean((1, 2))


class ResNet18(ResNet):
    """ResNet-18: 11,689,512 parameters with color images and 1000 classes."""

    NAME = "resnet18"
    BLOCKS = (2, 2, 2, 2)


class ResNet34(ResNet):
    """ResNet-34: 21,797,672 parameters with color images and 1000 classes."""

    NAME = "resnet34"
    BLOCKS = (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50: 25,557,032 parameters with color images and 1000 classes.

    As in torchvision, the stride of a bottleneck is in its 3x3 convolution, not in the first as in the paper. This is
    known as ResNet v1.5 (https://catalog.ngc.nvidia.com/orgs/nvidia/resources/resnet_50_v1_5_for_pytorch).
    """

    NAME = "resnet50"
    BLOCKS = (3, 4, 6, 3)
    BOTTLENECK = True


class _Stage(nn.Module):
    """Blocks of the same size, of which the first has the stride."""

    blocks: int
    channels: int
    stride: int
    bottleneck: bool
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        for index in range(self.blocks):
            stride = self.stride if index == 0 else 1
            x = _Block(self.channels, stride, self.bottleneck, self.portable, name=f"{index}")(x, batch)
        return x


class _Block(nn.Module):
    """Two convolutions, or a bottleneck of three, and the shortcut around them."""

    channels: int
    stride: int
    bottleneck: bool
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        if self.bottleneck:
            layers = [(self.channels, 1, 1), (self.channels, 3, self.stride), (4 * self.channels, 1, 1)]
        else:
            layers = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
        y = x
        for number, (features, kernel, stride) in enumerate(layers, start=1):
            y = y if number == 1 else nn.relu(y)
            y = conv(features, kernel, stride, self.portable, f"conv{number}")(y)
            y = BatchNorm(portable=self.portable, name=f"bn{number}")(y, batch)
        if self.stride != 1 or features != x.shape[-1]:
            x = _Downsample(features, self.stride, self.portable, name="downsample")(x, batch)
        return nn.relu(y + x)


class _Downsample(nn.Module):
    """A shortcut that changes the size."""

    features: int
    stride: int
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        x = conv(self.features, 1, self.stride, self.portable, "0")(x)
        return BatchNorm(portable=self.portable, name="1")(x, batch)
