"""The architectures, by the names that ``--model`` takes."""

import flax.linen as nn

from cnn_jax.models.cnn import CNN

MODELS: dict[str, type[nn.Module]] = {"cnn": CNN}
