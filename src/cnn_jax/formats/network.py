"""What is exported: a network apart from its training."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import flax.linen as nn
import jax
import numpy as np

from cnn_jax.training.state import Params, Variables
from cnn_jax.training.task import Task

Classifier = Callable[[np.ndarray], np.ndarray]
"""Uint8 images ``[N, H, W, C]`` to float ``[N, classes]``, the probabilities."""


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        model: the architecture's name.
        task: the model and how images are prepared for it.
        image_shape: ``(H, W, C)``.
        class_names: one for each logit.
        params: as the model names them, in the host's memory.
        model_state: the model's other collections, likewise.
    """

    model: str
    task: Task
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    params: Params
    model_state: Variables = dataclasses.field(default_factory=dict)

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
        task = dataclasses.replace(self.task, model=self.task.model.clone(portable=True))
        # GPUs and TPUs otherwise shorten the factors of a product, and give other numbers than were verified elsewhere.
        with jax.default_matmul_precision("highest"):
            return nn.softmax(task.logits({"params": self.params, **self.model_state}, images))
