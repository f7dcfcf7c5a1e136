"""The network of the PyTorch lesson."""

import flax.linen as nn
import jax

from cnn_jax.models.classifier import ImageClassifier
from cnn_jax.models.conv import Conv
from cnn_jax.models.layers import BatchContext, Dense


class CNN(ImageClassifier):
    """A LeNet-like network (LeCun et al., "Gradient-based learning applied to document recognition", 1998).

    32,998 parameters on 28x28x1 images and ten classes. It has neither dropout nor batch normalization.
    """

    NAME = "cnn"
    HEAD = "out"
    MIN_SIDE = 16

    def backbone(self, images: jax.Array, batch: BatchContext | None) -> jax.Array:
        """Images ``[N, H, W, C]`` to features ``[N, 60]``."""
        # max_pool(relu(conv1(images))), then the same with conv2
        x = Conv(6, (5, 5), relu_pool=True, portable=self.portable, name="conv1")(images)
        x = Conv(12, (5, 5), relu_pool=True, portable=self.portable, name="conv2")(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(120, name="fc1")(x))
        return nn.relu(Dense(60, name="fc2")(x))
