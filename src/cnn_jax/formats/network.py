"""What is exported: a network apart from its training."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import numpy as np

from cnn_jax.models import create_model
from cnn_jax.training.step import Params, eval_step

Classifier = Callable[[np.ndarray], np.ndarray]
"""Uint8 images ``[N, H, W, C]`` to float ``[N, classes]``, the probabilities."""


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        model: the architecture's name.
        image_shape: ``(H, W, C)``.
        class_names: one for each logit.
        params: as the model names them, in the host's memory.
    """

    model: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    params: Params

    @property
    def metadata(self) -> dict[str, str]:
        """What is to be known besides the weights, for formats with room for it: shape and names as JSON."""
        return {
            "model": self.model,
            "image_shape": json.dumps(self.image_shape),
            "class_names": json.dumps(self.class_names),
        }

    def probabilities(self, images: jax.Array) -> jax.Array:
        """Uint8 ``[N, H, W, C]`` to float32 ``[N, classes]``: the program that is exported, scaling and all."""
        model = create_model(self.model, len(self.class_names), portable=True)
        # GPUs and TPUs else shorten the factors of a product, and give other numbers than were verified elsewhere.
        with jax.default_matmul_precision("highest"):
            return nn.softmax(eval_step(self.params, model.apply, images))
