"""Hashable optimizers: those with equal settings are equal and share compiled programs."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
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
        """Create ``optax.adam`` with ``scale_by_adam`` of this module."""
        return optax.chain(scale_by_adam(), optax.scale_by_learning_rate(self.learning_rate))


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with accurate bias corrections.

    optax computes ``1 - b2**t`` in float32. In the first steps the difference is small and loses the digits of ``b2``:
    the result is wrong by about 1e-5 of its value, and so are the updates. PyTorch computes it in float64;
    ``-expm1(t * log(b2))`` is as accurate as float32 can be.

    Args:
        b1: decay rate of the average of the gradients.
        b2: decay rate of the average of their squares.
        eps: added to the denominator.
    """

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        mu_hat, nu_hat = _bias_correction(mu, b1, count), _bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def _bias_correction(moment: Any, decay: float, count: jax.Array) -> Any:
    correction = -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
    return jax.tree.map(lambda leaf: leaf / correction.astype(leaf.dtype), moment)
