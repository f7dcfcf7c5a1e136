"""Layers initialised as PyTorch initialises its own."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
