"""Optimizers as values: equal settings are equal, so that programs compiled for one serve the other."""

from dataclasses import dataclass
from typing import Protocol

import optax


class Optimizer(Protocol):
    """A hashable description of an optimizer."""

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer as optax's pair of functions."""


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, https://arxiv.org/abs/1412.6980); its other constants are the paper's, as in PyTorch.

    Attributes:
        learning_rate: constant over the run, so that a run may be resumed for more epochs.
    """

    learning_rate: float

    def transformation(self) -> optax.GradientTransformation:
        """``optax.adam``."""
        return optax.adam(self.learning_rate)
