"""A small network with batch normalization, which is fast on CPUs."""

import flax.linen as nn
import jax

from cnn_jax.errors import UsageError
from cnn_jax.models.classifier import ImageClassifier
from cnn_jax.models.conv import Conv
from cnn_jax.models.layers import BatchContext, BatchNorm, Dropout


class SmallCNN(ImageClassifier):
    """Three stages of 3x3 convolutions, and a linear layer.

    Each convolution is followed by ReLU and batch normalization. In the first of a stage, 2x2 max-pooling comes between
    the two, which leaves normalization a quarter of the numbers. With the default depth there are 29,290 parameters on
    28x28x1 images and ten classes, fewer than ``CNN`` has.

    Attributes:
        depth: number of convolutions, a multiple of three.
        width: number of channels in the first stage; the others have two and four times as many.
        dropout: dropout rate before the linear layer.
    """

    NAME = "small"
    HEAD = "out"
    MIN_SIDE = 8  # three times halved

    depth: int = 3
    width: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.depth < 3 or self.depth % 3:
            raise UsageError(
                f"--model-depth must be a multiple of 3 for the network {self.NAME}, such as 3 or 6, not {self.depth}"
            )
        super().__post_init__()

    def backbone(self, images: jax.Array, batch: BatchContext | None) -> jax.Array:
        """Images ``[N, H, W, C]`` to features ``[N, 4 * width * H // 8 * W // 8]``."""
        x = images
        per_stage = self.depth // 3
        for index in range(self.depth):
            features, pools = self.width * 2 ** (index // per_stage), index % per_stage == 0
            x = Conv(features, (3, 3), "SAME", relu_pool=pools, portable=self.portable, name=f"conv{index + 1}")(x)
            x = x if pools else nn.relu(x)
            x = BatchNorm(portable=self.portable, name=f"bn{index + 1}")(x, batch)
        # Flattened in the order channel, row, column, as PyTorch does.
        return Dropout(self.dropout)(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1), batch)
