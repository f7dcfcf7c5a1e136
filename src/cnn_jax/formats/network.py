"""A trained network without its training state, as it is exported."""

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
"""Maps uint8 images ``[N, H, W, C]`` to class probabilities, float ``[N, classes]``."""


@dataclass(frozen=True)
class Network:
    """A trained network to export.

    Attributes:
        model: the architecture's name.
        task: the model and the preprocessing of its images.
        image_shape: ``(H, W, C)``.
        class_names: one name per logit.
        params: the model's parameters, in host memory.
        model_state: the model's other collections, in host memory.
    """

    model: str
    task: Task
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    params: Params
    model_state: Variables = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> Variables:
        """The parameters and the other collections."""
        return {"params": self.params, **self.model_state}

    @property
    def metadata(self) -> dict[str, str]:
        """What formats with metadata store besides the weights, as JSON except for names."""
        return {
            "model": self.model,
            "tta": self.task.tta,
            "image_shape": json.dumps(self.image_shape),
            "mean": json.dumps(self.task.preprocess.mean),
            "std": json.dumps(self.task.preprocess.std),
            "class_names": json.dumps(self.class_names),
        }

    def probabilities(self, images: jax.Array) -> jax.Array:
        """Map uint8 images ``[N, H, W, C]`` to probabilities float32 ``[N, classes]``, including the preprocessing."""
        # In float32, because with a lower precision results would differ from those verified on a CPU.
        task = dataclasses.replace(self.task, model=self.task.model.clone(portable=True), precision="float32")
        return nn.softmax(task.logits(self.variables, images))
