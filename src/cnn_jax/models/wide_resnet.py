"""Wide residual networks."""

import flax.linen as nn
import jax

from cnn_jax.errors import UsageError
from cnn_jax.models.blocks import conv
from cnn_jax.models.classifier import ImageClassifier
from cnn_jax.models.layers import BatchContext, BatchNorm, Dropout


class WideResNet(ImageClassifier):
    """Zagoruyko and Komodakis, "Wide residual networks" (https://arxiv.org/abs/1605.07146).

    Three groups of blocks, in which batch normalization and ReLU come before each 3x3 convolution. WRN-16-4, the
    default, has 2.7 million parameters on CIFAR-10, and WRN-40-4 8.9 million. The names of the layers are those of the
    authors' PyTorch code (https://github.com/szagoruyko/wide-residual-networks).

    Attributes:
        depth: number of convolutions along the longest path, and the linear layer: 6 n + 4 with n blocks in a group.
        width: factor of the number of channels, which is 16, 32 and 64 in the groups with a factor of 1.
        dropout: probability that dropout between the convolutions of a block sets a number to zero.
    """

    NAME = "wide_resnet"
    HEAD = "fc"
    MIN_SIDE = 8  # twice halved, which leaves 2x2

    depth: int = 16
    width: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise UsageError(
                f"--model-depth must be 6 n + 4 for the network {self.NAME}, such as 10, 16, 28 or 40, not {self.depth}"
            )
        super().__post_init__()

    def backbone(self, images: jax.Array, batch: BatchContext | None) -> jax.Array:
        """Images ``[N, H, W, C]`` to features ``[N, 64 width]``."""
        x = conv(16, 3, 1, self.portable, "conv0")(images)
        for group in range(3):
            stride = 1 if group == 0 else 2
            features = 16 * 2**group * self.width
            layer = _Group((self.depth - 4) // 6, features, stride, self.dropout, self.portable, name=f"group{group}")
            x = layer(x, batch)
        return nn.relu(BatchNorm(portable=self.portable, name="bn")(x, batch)).mean((1, 2))


class _Group(nn.Module):
    """Blocks of the same size, of which the first has the stride."""

    blocks: int
    features: int
    stride: int
    dropout: float
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        for index in range(self.blocks):
            stride = self.stride if index == 0 else 1
            x = _Block(self.features, stride, self.dropout, self.portable, name=f"block{index}")(x, batch)
        return x


class _Block(nn.Module):
    """Two convolutions and the shortcut around them, which if it changes the size begins after the first ReLU."""

    features: int
    stride: int
    dropout: float
    portable: bool

    @nn.compact
    def __call__(self, x: jax.Array, batch: BatchContext | None) -> jax.Array:
        first = nn.relu(BatchNorm(portable=self.portable, name="bn0")(x, batch))
        y = conv(self.features, 3, self.stride, self.portable, "conv0")(first)
        y = nn.relu(BatchNorm(portable=self.portable, name="bn1")(y, batch))
        y = Dropout(self.dropout)(y, batch)
        y = conv(self.features, 3, 1, self.portable, "conv1")(y)
        if self.stride != 1 or self.features != x.shape[-1]:
            x = conv(self.features, 1, self.stride, self.portable, "convdim")(first)
        return y + x
