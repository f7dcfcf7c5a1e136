"""Hashable optimizers: those with equal settings are equal and share compiled programs."""

from dataclasses import dataclass
from typing import Protocol

import optax


class Optimizer(Protocol):
    """A hashable description of an optimizer."""

    def transformation(self) -> optax.GradientTransformation:
        """Create the optax optimizer."""


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, https://arxiv.org/abs/1412.6980); other settings have the defaults of optax and PyTorch.

    Attributes:
        learning_rate: constant, so that a run can be resumed for more epochs.
    """

    learning_rate: float

    def transformation(self) -> optax.GradientTransformation:
        """Create ``optax.adam``."""
        return optax.adam(self.learning_rate)
