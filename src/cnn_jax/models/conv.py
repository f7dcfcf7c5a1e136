"""Convolution and max-pooling: one meaning, two lowerings.

On GPUs and TPUs, a convolution is XLA's own operation. On CPUs, XLA's convolution is slow, especially backward and in
a compiled loop, where it runs on one thread, but its matrix product is fast. There, a convolution is computed as a
matrix product: cut the image into overlapping tiles, each just large enough for 2x2 outputs, make each tile a column,
and multiply by a matrix that holds the kernel once for each of the four outputs, shifted to the inputs of that output.
In one dimension, where a tile gives two outputs, a kernel ``(a, b, c)`` slides over ``x0 ... x7`` like this::

                  | a  b  c  .  |     | x0  x2  x4 |         | y0  y2  y4 |
                  | .  a  b  c  |  @  | x1  x3  x5 |    =    | y1  y3  y5 |
                                      | x2  x4  x6 |
                                      | x3  x5  x7 |
                    band matrix           tiles                outputs

One column per output (im2col) would copy 25 numbers per output for a 5x5 kernel. A tile copies 36 for four outputs,
and needs 36 multiplications where 25 would do. Which of the two is faster depends on the number of output channels,
between which a copy is shared: a tile gives one, two or four outputs, whichever has the lowest estimated cost, where
copying a number costs as much as 90 multiplications. On 3x3 kernels and two cores, four outputs took 0.5 of the time of
one with 1 -> 16 channels, 0.9 with 16 -> 32, 1.0 with 64 -> 64, 1.3 with 128 -> 128, 1.5 with 256 -> 256 and 4 with
512 -> 512, whose band matrix would have 67 MB. For 3x3 kernels with many channels, ``winograd`` multiplies the tiles by
fewer numbers: it took 0.96 of the time of the fastest band matrix with 32 -> 64 channels and images of 14 pixels, 0.81
with 64 -> 64 and 28, 0.58 with 128 -> 128 and 14, and, as odd images need larger tiles, 0.83 with 256 -> 256 and 7 (one
core of a Xeon, batches of 50). Three more things make it fast:

- The batch is the last axis. All copies are of contiguous runs over the batch, and the product is of a small matrix
  and a wide one, both contiguous, which XLA computes at the speed of the machine.
- The rows of the band matrix are ordered by the output's place in the tile first. The four members of a 2x2 pool are
  then four contiguous slabs of the result, and pooling is their elementwise maximum. Otherwise an output has to be
  moved to its pool, which costs as much as 600 multiplications: a layer that pools took 6 to 8 times as long with tiles
  of one or two outputs with 1 -> 48, 1 -> 64 and 3 -> 64 channels.
- Tiles are cut block by block in a loop. XLA cannot fuse the loop into one that looks up the source of each number.

The band matrix is made of copies of the kernel between zeros, so autodiff gives the kernel's gradient. Padding the
kernel took less time than multiplying it by constants of zeros and ones: a training step of the lesson's network took
0.97 of the time, and a convolution of 64 -> 128 channels with kernel 3 and stride 2 took 0.78 (jax 0.10, one core).

XLA's convolution is used for no shape. Forward and backward with the input's gradient in a compiled loop, XLA's
convolution takes 5 to 12 times as long as the band matrix with one input channel, 7 to 17 times with 8 -> 16 channels,
13 to 28 times with 32 -> 32 (kernels of 3, 5 and 7, images of 8 to 64 pixels), and 16 and 20 times with 64 -> 64 and
128 -> 128 (kernel 3, 8 pixels); with kernels of size 1, 10 times with 16 -> 32 and 30 times with 64 -> 64 channels.
With strides it takes 5 to 40 times as long, and computing all outputs to drop most of them takes longer as well, as
these multiples of the band matrix's time show (batches of 64, padding ``"SAME"``, two cores, jax 0.10):

=====  =========  ======  ======  =================  =======================
image  channels   kernel  stride  XLA's convolution  band matrix of stride 1
=====  =========  ======  ======  =================  =======================
32x32  3 -> 32    3       2       13                 3.0
32x32  16 -> 32   3       2       8                  1.5
16x16  32 -> 64   3       2       13                 2.3
8x8    64 -> 128  3       2       17                 2.6
28x28  8 -> 16    5       2       8                  2.8
64x64  3 -> 16    7       2       5                  1.7
32x32  16 -> 32   1       2       12                 8.3
16x16  64 -> 128  1       2       43                 21
=====  =========  ======  ======  =================  =======================

Called once and not in a loop, XLA's convolution uses both cores, and from 8 channels on it is up to four times as fast
as the band matrix. The price is memory: the tiles hold each number of the image 4, 9 or 16 times for kernels of 3, 5
or 7. In bfloat16 the band matrix takes 1 to 2 times as long as in float32 on a CPU without bfloat16 instructions.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cnn_jax.models import winograd
from cnn_jax.models.layers import accumulator_dtype, add_bias, promote, uniform_fan_in

Padding = str | tuple[tuple[int, int], tuple[int, int]]
"""``"VALID"``, ``"SAME"``, or the zeros above and below, and left and right."""

Strides = tuple[int, int]

_POOL = 2  # side of a pool

_COPY = 90
"""The time to copy a number into a tile, in multiplications of a matrix product."""

_POOLED = 600
"""The time to pool a number that is not next to the other members of its pool, in the same unit."""


class Conv(nn.Module):
    """Convolution with the parameters of ``flax.linen.Conv``, by default initialized as in ``torch.nn.Conv2d``.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel.
        padding: ``"VALID"``, or ``"SAME"`` for an output as large as the input, divided by the strides.
        relu_pool: also apply ReLU and ``max_pool``, which on CPUs is faster than three operations; strides must be 1.
        portable: use XLA's convolution on CPUs too, for a program exported to all platforms at once.
        strides: steps between outputs, vertical and horizontal.
        use_bias: whether to add a bias.
        dtype: type of the computation and the result; None promotes the types of the input and the parameters.
        kernel_init: initializer of the kernel; None for ``uniform_fan_in``, from which the bias is drawn in any case.
    """

    features: int
    kernel_size: tuple[int, int]
    padding: Padding = "VALID"
    relu_pool: bool = False
    portable: bool = False
    strides: Strides = (1, 1)
    use_bias: bool = True
    dtype: jnp.dtype | None = None
    kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[N, H, W, C]`` to ``[N, H', W', features]``, where ``relu_pool`` halves height and width.

        Raises:
            ValueError: ``relu_pool`` with strides.
        """
        if self.relu_pool and self.strides != (1, 1):
            raise ValueError(f"relu_pool needs strides of (1, 1), got {self.strides}")
        shape = (*self.kernel_size, x.shape[-1], self.features)
        init = uniform_fan_in(math.prod(shape[:3]))
        kernel = self.param("kernel", self.kernel_init or init, shape)
        bias = self.param("bias", init, shape[3:]) if self.use_bias else None
        x, kernel = promote(x, kernel, dtype=self.dtype)
        by_tiles, by_xla = (
            functools.partial(lowering, strides=self.strides, padding=self.padding, relu_pool=self.relu_pool)
            for lowering in (_by_tiles, _by_xla)
        )
        if self.portable:
            return by_xla(x, kernel, bias)
        return lax.platform_dependent(x, kernel, bias, cpu=by_tiles, default=by_xla)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling of ``[N, H, W, C]`` with stride 2; drops an odd last row or column, as PyTorch does.

    Implemented as a maximum over reshaped axes because XLA's pooling has no deterministic gradient on GPUs.
    """
    n, h, w, c = x.shape
    x = x[:, : h // _POOL * _POOL, : w // _POOL * _POOL]
    return x.reshape(n, h // _POOL, _POOL, w // _POOL, _POOL, c).max(axis=(2, 4))


def overlapping_max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling of ``[N, H, W, C]`` with stride 2 and padding 1: height and width are halved and rounded up.

    As in PyTorch, the first of equal members gets the gradient, and the result is NaN if a member is. The maximum is
    taken over shifted images, first along the rows, then along the columns, because XLA's pooling has no deterministic
    gradient on GPUs.
    """
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)])
    for axis in (2, 1):
        last = x.shape[axis] - 3
        members = (lax.slice_in_dim(x, tap, tap + last + 1, 2, axis) for tap in range(3))
        x = functools.reduce(_first_max, members)
    return x


def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """The larger of two numbers; autodiff's ``jnp.maximum`` would share the gradient between equal ones."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def _by_xla(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, strides: Strides, padding: Padding, relu_pool: bool
) -> jax.Array:
    """The convolution as XLA's own operation."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)
    y = add_bias(y, None if bias is None else bias.reshape(1, 1, 1, -1))
    return max_pool(nn.relu(y)) if relu_pool else y


class _Axis(NamedTuple):
    """How the image is tiled along its height or width.

    Attributes:
        taps: size of the kernel.
        stride: steps between outputs.
        outputs: outputs along the side of a tile.
    """

    taps: int
    stride: int
    outputs: int

    @property
    def step(self) -> int:
        """The distance between neighboring tiles, and the side of a block."""
        return self.stride * self.outputs

    @property
    def blocks(self) -> int:
        """How many blocks a tile is long: enough for all that its outputs look at."""
        return -(-(self.stride * (self.outputs - 1) + self.taps) // self.step)

    def out(self, length: int) -> int:
        """The number of outputs along a padded image of this length."""
        return (length - self.taps) // self.stride + 1

    def zeros(self, output: int) -> tuple[int, int]:
        """How many zeros are before and after the taps in the row of the band matrix for an output of the tile."""
        before = self.stride * output
        return before, self.blocks * self.step - before - self.taps


_Axes = tuple[_Axis, _Axis]


def _by_tiles(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, strides: Strides, padding: Padding, relu_pool: bool
) -> jax.Array:
    """The convolution as a matrix product with the image's tiles."""
    window = kernel.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], window, strides, padding) if isinstance(padding, str) else padding
    # A kernel of size 1 looks at nothing between its outputs.
    skips = [stride if (k, *pad) == (1, 0, 0) else 1 for k, stride, pad in zip(window, strides, pads, strict=True)]
    x = x[:, :: skips[0], :: skips[1]]
    strides = (strides[0] // skips[0], strides[1] // skips[1])
    size = [length + sum(pad) for length, pad in zip(x.shape[1:3], pads, strict=True)]
    axes, by_winograd = _choose_tiles(size, kernel.shape, strides, x.dtype, relu_pool)
    if relu_pool and [axis.outputs for axis in axes] != [_POOL, _POOL]:
        return max_pool(nn.relu(_by_tiles(x, kernel, bias, strides=strides, padding=padding, relu_pool=False)))
    out = [axis.out(length) for length, axis in zip(size, axes, strict=True)]
    tiles = [n // _POOL if relu_pool else -(-n // axis.outputs) for n, axis in zip(out, axes, strict=True)]
    sizes = [axis.step * (number + axis.blocks - 1) for number, axis in zip(tiles, axes, strict=True)]
    image = _fit(x.transpose(3, 1, 2, 0), pads, sizes)
    if by_winograd:
        product = winograd.convolve(image, kernel)
    else:
        band = _band_matrix(kernel, axes)
        product = band @ _cut(image, axes).reshape(band.shape[1], math.prod(tiles) * len(x))
    features = kernel.shape[3]
    if relu_pool:
        return _relu_max(product, bias).reshape(features, *tiles, len(x)).transpose(3, 1, 2, 0)
    side = [axis.outputs for axis in axes]
    y = product.reshape(*side, features, *tiles, len(x)).transpose(5, 3, 0, 4, 1, 2)
    y = y.reshape(len(x), side[0] * tiles[0], side[1] * tiles[1], features)
    return add_bias(y[:, : out[0], : out[1]], None if bias is None else bias.reshape(1, 1, 1, -1))


def _choose_tiles(
    size: Sequence[int], kernel: tuple[int, int, int, int], strides: Strides, dtype: jnp.dtype, relu_pool: bool
) -> tuple[_Axes, bool]:
    """The tiles with the lowest estimated cost, and whether their product is computed with Winograd's algorithm.

    Args:
        size: height and width of the padded image.
        kernel: its shape.
        strides: steps between outputs.
        dtype: type of the image; Winograd's sums are too inaccurate for 16 bits.
        relu_pool: whether the outputs are pooled, which takes little time if a tile is a pool.
    """
    *window, channels, features = kernel

    def num_tiles(axes: _Axes) -> int:
        return math.prod(-(-axis.out(length) // axis.outputs) for length, axis in zip(size, axes, strict=True))

    def band_cost(axes: _Axes) -> float:
        places = math.prod(axis.blocks * axis.step for axis in axes)
        outputs = math.prod(axis.outputs for axis in axes)
        pooling = _POOLED * outputs * features if relu_pool and outputs < _POOL**2 else 0
        return num_tiles(axes) * (places * channels * (_COPY + outputs * features) + pooling)

    candidates = itertools.product((1, _POOL), repeat=2)
    band = min((tuple(map(_Axis, window, strides, outputs)) for outputs in candidates), key=band_cost)
    if window != [3, 3] or strides != (1, 1) or jnp.dtype(dtype).itemsize < 4:
        return band, False
    axes = (_Axis(3, 1, _POOL), _Axis(3, 1, _POOL))
    transformations = winograd.TRANSFORMATION * (channels + features)
    cost = num_tiles(axes) * (winograd.MULTIPLICATIONS * channels * features + transformations)
    return (axes, True) if cost < band_cost(band) else (band, False)


def _fit(image: jax.Array, pads: Sequence[tuple[int, int]], sizes: Sequence[int]) -> jax.Array:
    """Pads ``[C, H, W, N]`` with zeros before it, and with zeros or a cut after it to the sizes that the tiles need."""
    spatial = [(low, size - low - old, 0) for (low, _), size, old in zip(pads, sizes, image.shape[1:3], strict=True)]
    return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def _band_matrix(kernel: jax.Array, axes: _Axes) -> jax.Array:
    """``[kh, kw, C, O]`` to ``[outputs O, places C]``: a row for each output of a tile, a column for each input."""
    down, across = axes
    *_, channels, features = kernel.shape
    wide = kernel.astype(accumulator_dtype(kernel.dtype))  # the gradient adds up the kernel's copies
    copies = [
        jnp.pad(wide, (down.zeros(i), across.zeros(j), (0, 0), (0, 0)))
        for i, j in np.ndindex(down.outputs, across.outputs)
    ]
    matrix = jnp.stack(copies).reshape(-1, down.blocks, down.step, across.blocks, across.step, channels, features)
    matrix = matrix.transpose(0, 6, 1, 3, 2, 4, 5).astype(kernel.dtype)
    return matrix.reshape(len(copies) * features, -1)


def _block(image: jax.Array, index: jax.Array, axes: _Axes) -> tuple[jax.Array, tuple[int, ...]]:
    """The part of ``[C, H, W, N]`` covered by one block of every tile, and where it begins."""
    down, across = axes
    channels, height, width, n = image.shape
    height, width = height - down.step * (down.blocks - 1), width - across.step * (across.blocks - 1)
    start = (0, index // across.blocks * down.step, index % across.blocks * across.step, 0)
    return lax.dynamic_slice(image, start, (channels, height, width, n)), start


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(image: jax.Array, axes: _Axes) -> jax.Array:
    """Overlapping tiles of ``[C, H, W, N]``, one for each step down and across, each made of blocks.

    The gradient has its own rule because autodiff's would add a whole image for every block.

    Returns:
        ``[blocks, step down, step across, C, tiles down, tiles across, N]``.
    """

    def take(index: jax.Array) -> jax.Array:
        block, _ = _block(image, index, axes)
        channels, height, width, n = block.shape
        down, across = axes[0].step, axes[1].step
        block = block.reshape(channels, height // down, down, width // across, across, n)
        return block.transpose(2, 4, 0, 1, 3, 5)

    return lax.map(take, jnp.arange(axes[0].blocks * axes[1].blocks))


def _cut_forward(image: jax.Array, axes: _Axes) -> tuple[jax.Array, None]:
    return _cut(image, axes), None


def _cut_backward(axes: _Axes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    channels, *tiles, n = gradient.shape[3:]
    sizes = [axis.step * (number + axis.blocks - 1) for number, axis in zip(tiles, axes, strict=True)]
    wide = accumulator_dtype(gradient.dtype)

    def add(index: jax.Array, image: jax.Array) -> jax.Array:
        block, start = _block(image, index, axes)
        block += gradient[index].transpose(2, 3, 0, 4, 1, 5).reshape(block.shape).astype(wide)
        return lax.dynamic_update_slice(image, block, start)

    image = lax.fori_loop(0, len(gradient), add, jnp.zeros((channels, *sizes, n), wide))
    return (image.astype(gradient.dtype),)


_cut.defvjp(_cut_forward, _cut_backward)


@jax.custom_vjp
def _relu_max(members: jax.Array, bias: jax.Array | None) -> jax.Array:
    """ReLU of the maximum over the four members ``[4 O, M]`` of each pool, plus the bias ``[O]``: ``[O, M]``.

    The gradient has its own rule, which gives it to the first of equal members, as PyTorch does. Autodiff would pad
    each member's gradient to the size of all four and add them.
    """
    largest = functools.reduce(jnp.maximum, jnp.split(members, _POOL**2))
    return nn.relu(add_bias(largest, None if bias is None else bias.reshape(-1, 1)))


def _relu_max_forward(members: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, tuple[Any, ...]]:
    y = _relu_max(members, bias)
    return y, (members, bias, y)


def _relu_max_backward(saved: tuple[Any, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    members, bias, y = saved
    gradient = jnp.where(y > 0, gradient, 0)
    a, b, c, d = jnp.split(members, _POOL**2)
    ab, cd = jnp.maximum(a, b), jnp.maximum(c, d)
    first = jnp.where(ab >= cd, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    members_gradient = jnp.concatenate([jnp.where(first == i, gradient, 0) for i in range(_POOL**2)])
    if bias is None:
        return members_gradient, None
    return members_gradient, gradient.astype(accumulator_dtype(gradient.dtype)).sum(1).astype(bias.dtype)


_relu_max.defvjp(_relu_max_forward, _relu_max_backward)
