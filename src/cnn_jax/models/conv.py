"""Convolution and max-pooling: one meaning, two lowerings.

Everywhere but on CPUs a convolution is XLA's own. On CPUs XLA's is slow, above all backward and in a compiled loop,
where it has one thread, while its matrix product is fast; so there a convolution is a matrix product. Cut the image
into overlapping tiles, each just large enough for 2x2 outputs, lay every tile out as a column, and multiply by one
matrix that holds the kernel once for each of the four outputs, shifted to where that output looks. In one dimension,
where a tile gives two outputs, a kernel ``(a, b, c)`` slides over ``x0 ... x7`` like this::

                  | a  b  c  .  |     | x0  x2  x4 |         | y0  y2  y4 |
                  | .  a  b  c  |  @  | x1  x3  x5 |    =    | y1  y3  y5 |
                                      | x2  x4  x6 |
                                      | x3  x5  x7 |
                    band matrix           tiles                outputs

A column for each output (im2col) would copy 25 numbers an output for a 5x5 kernel; a tile copies 36 for four, at the
price of 36 multiplications where 25 would do. What else makes it fast:

- The batch is the last axis, so that all copying is in runs over the batch, and the product is of a small matrix and
  a wide one, both contiguous: XLA does these at the speed of the machine.
- The rows of the band matrix are ordered by their place in the tile first, so that the four members of a 2x2 pool
  are four contiguous slabs of the result, and pooling is their elementwise maximum.
- Tiles are cut block by block in a loop, which XLA cannot fuse into one that looks up the source of every number.

The band matrix is the kernel times a constant of zeros and ones: autodiff through it gives the kernel's gradient.

No shape is made an exception. Forward and backward with the input's gradient in a compiled loop, XLA's convolution
takes 5 to 12 times as long as the band matrix with one input channel, 7 to 17 times with 8 -> 16 channels, 13 to 28
times with 32 -> 32 (kernels of 3, 5 and 7, images of 8 to 64 pixels), and 16 and 20 times with 64 -> 64 and 128 -> 128
(kernel 3, 8 pixels); with 1x1 kernels, which waste three quarters of the matrix, 0.7 to 16 times (two cores, jax 0.10).
Called once and not in a loop, XLA's has both cores, and from 8 channels on is up to four times as fast as the band
matrix. The price is memory: the tiles hold each number of the image 4, 9 or 16 times for kernels of 3, 5 or 7.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn_jax.models.layers import uniform_fan_in

_TILE = 2  # outputs along the side of a tile, and the side of a pool


class Conv(nn.Module):
    """Convolution, stride 1, with the parameters of ``flax.linen.Conv`` initialised as ``torch.nn.Conv2d``.

    Attributes:
        features: output channels.
        kernel_size: height and width of the kernel.
        padding: ``"VALID"``, or ``"SAME"`` for an output as large as the input.
        relu_pool: follow with ReLU and ``max_pool``, in one operation that is faster on CPUs than the three.
        portable: XLA's own convolution on CPUs too, for a program that is exported to every platform at once.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: str = "VALID"
    relu_pool: bool = False
    portable: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Float32 ``[N, H, W, C]`` to ``[N, H', W', features]``; half as high and wide with ``relu_pool``."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        init = uniform_fan_in(math.prod(shape[:3]))
        kernel, bias = self.param("kernel", init, shape), self.param("bias", init, shape[3:])
        by_band, by_xla = (
            functools.partial(lowering, padding=self.padding, relu_pool=self.relu_pool)
            for lowering in (_by_band, _by_xla)
        )
        if self.portable:
            return by_xla(x, kernel, bias)
        return lax.platform_dependent(x, kernel, bias, cpu=by_band, default=by_xla)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling, stride 2, of ``[N, H, W, C]``; an odd last row or column is left out, as in PyTorch.

    A maximum over reshaped axes, because XLA has no deterministic gradient of its pooling operation on GPUs.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def _by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, padding: str, relu_pool: bool) -> jax.Array:
    """The convolution as XLA's own operation."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers) + bias
    return max_pool(nn.relu(y)) if relu_pool else y


def _by_band(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, padding: str, relu_pool: bool) -> jax.Array:
    """The convolution as the product of a band matrix and the image's tiles."""
    window = kernel.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], window, (1, 1), padding)
    out = [size + sum(pad) - k + 1 for size, pad, k in zip(x.shape[1:3], pads, window, strict=True)]
    tiles = [size // _TILE if relu_pool else -(-size // _TILE) for size in out]
    blocks = tuple(k // _TILE + 1 for k in window)
    image = _fit(x.transpose(3, 1, 2, 0), pads, [_TILE * (t + b - 1) for t, b in zip(tiles, blocks, strict=True)])
    band = _band_matrix(kernel, blocks)
    product = band @ _cut(image, blocks).reshape(band.shape[1], math.prod(tiles) * len(x))
    if relu_pool:
        return _relu_max(product, bias).reshape(len(bias), *tiles, len(x)).transpose(3, 1, 2, 0)
    y = product.reshape(_TILE, _TILE, len(bias), *tiles, len(x)).transpose(5, 3, 0, 4, 1, 2)
    y = y.reshape(len(x), _TILE * tiles[0], _TILE * tiles[1], len(bias))
    return y[:, : out[0], : out[1]] + bias


def _fit(image: jax.Array, pads: Sequence[tuple[int, int]], sizes: Sequence[int]) -> jax.Array:
    """Zeros before ``[C, H, W, N]`` as the padding asks, and zeros after it, or a cut, for the size the tiles ask."""
    spatial = [(low, size - low - old, 0) for (low, _), size, old in zip(pads, sizes, image.shape[1:3], strict=True)]
    return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def _band_matrix(kernel: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """``[kh, kw, C, O]`` to ``[4 O, 4 blocks C]``: a row for every output of a tile, a column for every input."""
    # [tap, output, block, place]: 1 where an output of a tile meets a tap of the kernel at a place in a block.
    rows, columns = (
        np.stack([np.eye(_TILE, _TILE * b, tap, dtype=kernel.dtype) for tap in range(k)]).reshape(k, _TILE, b, _TILE)
        for k, b in zip(kernel.shape[:2], blocks, strict=True)
    )
    matrix = jnp.einsum("ijco,ipub,jqvd->pqouvbdc", kernel, rows, columns)
    return matrix.reshape(_TILE**2 * kernel.shape[3], -1)


def _block(image: jax.Array, index: jax.Array, blocks: tuple[int, int]) -> tuple[jax.Array, tuple[int, ...]]:
    """The part of ``[C, H, W, N]`` that one of the ``blocks`` of every tile covers, and where it begins."""
    channels, height, width, n = image.shape
    height, width = height - _TILE * (blocks[0] - 1), width - _TILE * (blocks[1] - 1)
    start = (0, index // blocks[1] * _TILE, index % blocks[1] * _TILE, 0)
    return lax.dynamic_slice(image, start, (channels, height, width, n)), start


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(image: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """Overlapping tiles of ``[C, H, W, N]``, ``blocks`` blocks of 2x2 high and wide, at every second row and column.

    The gradient has a rule of its own because autodiff's would add a whole image for every block.

    Returns:
        ``[blocks, 2, 2, C, tiles down, tiles across, N]``.
    """

    def take(index: jax.Array) -> jax.Array:
        block, _ = _block(image, index, blocks)
        channels, height, width, n = block.shape
        block = block.reshape(channels, height // _TILE, _TILE, width // _TILE, _TILE, n)
        return block.transpose(2, 4, 0, 1, 3, 5)

    return lax.map(take, jnp.arange(math.prod(blocks)))


def _cut_forward(image: jax.Array, blocks: tuple[int, int]) -> tuple[jax.Array, None]:
    return _cut(image, blocks), None


def _cut_backward(blocks: tuple[int, int], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    channels, down, across, n = gradient.shape[3:]
    shape = (channels, _TILE * (down + blocks[0] - 1), _TILE * (across + blocks[1] - 1), n)

    def add(index: jax.Array, image: jax.Array) -> jax.Array:
        block, start = _block(image, index, blocks)
        block += gradient[index].transpose(2, 3, 0, 4, 1, 5).reshape(block.shape)
        return lax.dynamic_update_slice(image, block, start)

    return (lax.fori_loop(0, len(gradient), add, jnp.zeros(shape, gradient.dtype)),)


_cut.defvjp(_cut_forward, _cut_backward)


@jax.custom_vjp
def _relu_max(members: jax.Array, bias: jax.Array) -> jax.Array:
    """ReLU of the maximum over the four members ``[4 O, M]`` of every pool, with the bias: ``[O, M]``.

    The gradient has a rule of its own, which gives it to the first of equal members, as PyTorch does: autodiff
    would pad the gradient of every member to the size of all four and add them.
    """
    return nn.relu(functools.reduce(jnp.maximum, jnp.split(members, _TILE**2)) + bias[:, None])


def _relu_max_forward(members: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _relu_max(members, bias)
    return y, (members, y)


def _relu_max_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    members, y = saved
    gradient = jnp.where(y > 0, gradient, 0)
    a, b, c, d = jnp.split(members, _TILE**2)
    ab, cd = jnp.maximum(a, b), jnp.maximum(c, d)
    first = jnp.where(ab >= cd, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.concatenate([jnp.where(first == i, gradient, 0) for i in range(_TILE**2)]), gradient.sum(1)


_relu_max.defvjp(_relu_max_forward, _relu_max_backward)
