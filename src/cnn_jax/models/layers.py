"""Layers initialised as PyTorch initialises its own."""

import math
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class BatchContext:
    """What layers that behave differently in training know about the batch; None stands for inference.

    A pytree with ``axis_name`` as static data, so that it can be an argument of ``jax.jit``, ``nn.remat`` or a scan.

    Attributes:
        positions: int32 ``[N]``, the place of each example in the whole batch, of which this device may hold a part.
        mask: bool ``[N]``, false for padding.
        axis_name: the mapped axis over the devices that share the batch, if there are several.
    """

    positions: jax.Array
    mask: jax.Array
    axis_name: str | None = flax.struct.field(pytree_node=False, default=None)

    def num_examples(self) -> jax.Array:
        """The number of real examples in the whole batch, as float32."""
        return self._sum_over_devices(self.mask.astype(jnp.float32).sum())

    def mean(self, x: jax.Array, axes: Sequence[int] = ()) -> jax.Array:
        """The float32 mean of ``x`` over all real examples of the whole batch.

        A device's part of the batch may be all padding, so sums and counts are added up over the devices, not means.
        The result is NaN if the whole batch is padding.

        Args:
            x: ``[N, ...]``; whatever it holds for padding does not count.
            axes: further axes of ``x`` to average over, counted from 1.

        Returns:
            ``x`` without its first axis and without ``axes``.
        """
        # Summing each example first is more precise than one long sum, and needs the mask only for what is left.
        sums = x.astype(jnp.float32).sum(tuple(axes))
        mask = self.mask.reshape(-1, *[1] * (sums.ndim - 1))
        total = self._sum_over_devices(jnp.where(mask, sums, 0).sum(0))
        return total / (self.num_examples() * math.prod(x.shape[axis] for axis in axes))

    def keys(self, key: jax.Array) -> jax.Array:
        """One random key per example, which does not depend on how the batch is divided among devices."""
        return jax.vmap(jax.random.fold_in, (None, 0))(key, self.positions)

    def _sum_over_devices(self, x: jax.Array) -> jax.Array:
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Initialiser drawing from the uniform distribution on ±1/sqrt(fan_in).

    PyTorch's default for the weights and biases of ``nn.Linear`` and ``nn.Conv2d`` (LeCun et al., "Efficient
    BackProp", 1998): standard deviation ``1 / sqrt(3 fan_in)``.

    Args:
        fan_in: inputs that one output unit sums over.
    """
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """``x @ kernel + bias``, the parameters of ``flax.linen.Dense`` initialised as ``torch.nn.Linear``.

    Attributes:
        features: size of the last axis of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., I]`` to ``[..., features]``."""
        init = uniform_fan_in(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        return x @ kernel + bias
