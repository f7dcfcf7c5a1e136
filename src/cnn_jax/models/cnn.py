"""The network of the PyTorch lesson."""

import flax.linen as nn
import jax

from cnn_jax.errors import UsageError
from cnn_jax.models.conv import Conv
from cnn_jax.models.layers import BatchContext, Dense


class CNN(nn.Module):
    """A LeNet-like network (LeCun et al., "Gradient-based learning applied to document recognition", 1998).

    32,998 parameters on 28x28x1 images and ten classes.

    Attributes:
        num_classes: number of logits.
        portable: see ``Conv``.
    """

    num_classes: int
    portable: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, batch: BatchContext | None = None) -> jax.Array:
        """Float32 images ``[N, H, W, C]`` to float32 logits ``[N, num_classes]``.

        ``batch`` is not used: there is neither dropout nor batch normalization.
        """
        height, width = images.shape[1:3]
        if min(height, width) < 16:
            raise UsageError(
                f"the network cnn needs images of at least 16x16 pixels, not {height}x{width}: use larger images, or "
                "resize those of folder:PATH with --image-size, such as --image-size 64 64"
            )
        # max_pool(relu(conv1(images))), then the same with conv2
        x = Conv(6, (5, 5), relu_pool=True, portable=self.portable, name="conv1")(images)
        x = Conv(12, (5, 5), relu_pool=True, portable=self.portable, name="conv2")(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(120, name="fc1")(x))
        x = nn.relu(Dense(60, name="fc2")(x))
        return Dense(self.num_classes, name="out")(x)
