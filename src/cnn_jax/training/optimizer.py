"""Optimizers and learning rate schedules, as hashable descriptions that are static to ``jax.jit``."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from cnn_jax.errors import UsageError
from cnn_jax.training.state import Params


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update, as a fraction of the highest one.

    Attributes:
        kind: how it goes on after the warm-up: ``"constant"``, or ``"linear"``, ``"cosine"`` or ``"one-cycle"`` down to
            zero after ``updates``. In ``"one-cycle"`` (Smith & Topin, https://arxiv.org/abs/1708.07120) the warm-up
            starts at 1 / 25, follows a cosine too, and by default is 30 % of the updates, as in PyTorch, which also
            changes the momentum.
        updates: the number of updates in the run.
        warmup: the number of updates in which the rate rises linearly from zero.

    Raises:
        UsageError: the warm-up is as long as the run.
    """

    kind: Literal["constant", "linear", "cosine", "one-cycle"] = "constant"
    updates: int = 0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup > 0 and self.warmup >= self.updates:
            raise UsageError(
                f"the warm-up takes {self.warmup} updates, and the whole run {self.updates}: set a shorter --warmup or "
                "more --epochs"
            )

    def __call__(self, count: jax.Array) -> jax.Array:
        """The fraction after ``count`` updates, a float32 scalar."""
        decay = self.updates - self.warmup
        match self.kind:
            case "one-cycle":
                # Half an update more, as optax rounds the number of updates down.
                fraction = (self.warmup + 0.5) / self.updates if self.warmup else 0.3
                return optax.cosine_onecycle_schedule(self.updates, 1.0, fraction)(count)
            case "linear":
                after = optax.linear_schedule(1.0, 0.0, decay)
            case "cosine":
                after = optax.cosine_decay_schedule(1.0, decay)
            case _:
                after = optax.constant_schedule(1.0)
        if not self.warmup:
            return after(count)
        return optax.join_schedules([optax.linear_schedule(0.0, 1.0, self.warmup), after], [self.warmup])(count)

    @property
    def is_constant(self) -> bool:
        """Whether the learning rate is the same for all updates."""
        return self.kind == "constant" and self.warmup == 0


def num_steps(duration: str, steps_per_epoch: int) -> int:
    """Convert a duration such as ``"0.5 epochs"`` or ``"300 steps"`` to steps, rounded to the nearest integer."""
    number, unit = re.fullmatch(r"([0-9.]+) ?(epoch|step)s?", duration).groups()
    return round(float(number) * (steps_per_epoch if unit == "epoch" else 1))


@dataclass(frozen=True)
class Optimizer:
    """Turns gradients into updates of the parameters. By default it is Adam, with the defaults of optax and PyTorch.

    The learning rate is not a part of it but an argument, so that programs compiled for one learning rate serve all.

    Attributes:
        name: ``"adam"`` (Kingma & Ba, https://arxiv.org/abs/1412.6980), ``"adamw"`` (Loshchilov & Hutter,
            https://arxiv.org/abs/1711.05101), ``"sgd"`` with Nesterov momentum as in PyTorch, or ``"muon"`` (Jordan et
            al., https://kellerjordan.github.io/posts/muon/) for kernels except the head's, with Adam for the rest.
        weight_decay: after multiplication by the learning rate, the fraction of every kernel that is subtracted in each
            update. Biases and the parameters of normalization do not decay.
        momentum: the momentum of ``"sgd"`` and ``"muon"``.
        clip_norm: the largest norm of the gradient, or None.
        accumulate: the number of steps whose gradients are averaged for one update.
        backbone_rate: factor of the learning rate of all layers but the head; 0 freezes them.
        head: the name of the last layer.
        schedule: how the learning rate changes.

    Raises:
        UsageError: weight decay with ``"adam"``.
    """

    name: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip_norm: float | None = None
    accumulate: int = 1
    backbone_rate: float = 1.0
    head: str = "out"
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        if self.name == "adam" and self.weight_decay:
            raise UsageError("adam has no weight decay: use --optimizer adamw")

    def init(self, params: Params) -> optax.OptState:
        """The initial state."""
        return self._transformation(1.0).init(params)

    def update(
        self, grads: Params, state: optax.OptState, params: Params, learning_rate: jax.typing.ArrayLike
    ) -> tuple[optax.Updates, optax.OptState]:
        """Compute what to add to the parameters.

        Args:
            grads: the gradient of the loss.
            state: the state before the update.
            params: the parameters before the update.
            learning_rate: the highest one, a float32 scalar.

        Returns:
            The updates, with the structure of ``params``, and the state after the update.
        """
        return self._transformation(learning_rate).update(grads, state, params)

    def _transformation(self, learning_rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
        """Create the optax optimizer; parts that do nothing are left out."""
        parts = [self._scale()]
        if self.clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=_is_kernel))
        if self.backbone_rate != 1:
            parts.append(optax.masked(optax.scale(self.backbone_rate), self._is_backbone))
        constant = self.schedule.is_constant
        rate = learning_rate if constant else lambda count: learning_rate * self.schedule(count)
        chain = optax.chain(*parts, optax.scale_by_learning_rate(rate))
        return optax.MultiSteps(chain, self.accumulate).gradient_transformation() if self.accumulate > 1 else chain

    def _scale(self) -> optax.GradientTransformation:
        match self.name:
            case "sgd":
                return optax.trace(self.momentum, nesterov=True)
            case "muon":
                # It multiplies by minus its learning rate. With this RMS, the rates that suit Adam suit Muon too.
                return optax.contrib.muon(
                    -1.0, beta=self.momentum, muon_weight_dimension_numbers=self._matrices, consistent_rms=0.2
                )
        return scale_by_adam()

    def _is_backbone(self, params: Params) -> Any:
        return _map_with_layer(lambda layer, leaf: layer != self.head, params)

    def _matrices(self, params: Params) -> Any:
        """How Muon sees kernels as matrices: the last axis is the output, all others the input. None for the rest."""
        return _map_with_layer(
            lambda layer, leaf: (
                None
                if leaf.ndim < 2 or layer == self.head
                else optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
            ),
            params,
        )


def _map_with_layer(function: Callable[[str, jax.Array], Any], params: Params) -> Any:
    return jax.tree.map_with_path(lambda path, leaf: function(path[0].key, leaf), params)


def _is_kernel(params: Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


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
