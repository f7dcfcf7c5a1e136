"""Convolution and max-pooling."""

import flax.linen as nn
import jax

from cnn_jax.models.layers import uniform_fan_in


class Conv(nn.Module):
    """Valid convolution, stride 1, with the parameters of ``flax.linen.Conv`` initialised as ``torch.nn.Conv2d``.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
    """

    features: int
    kernel_size: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, H, W, C]`` to ``[N, H - kh + 1, W - kw + 1, features]``."""
        kh, kw = self.kernel_size
        init = uniform_fan_in(kh * kw * x.shape[-1])
        kernel = self.param("kernel", init, (kh, kw, x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        dimension_numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimension_numbers) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling, stride 2, of ``[N, H, W, C]``; an odd last row or column is left out, as in PyTorch."""
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
