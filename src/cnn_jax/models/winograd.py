"""3x3 convolution with Winograd's minimal filtering (Lavin & Gray, https://arxiv.org/abs/1509.09308), F(2x2, 3x3).

A tile of 4x4 inputs gives 2x2 outputs. In one dimension, four products ``m`` of transformed inputs and a transformed
kernel ``(a, b, c)`` give two outputs, where six products would be needed otherwise::

    m0 = (x0 - x2) * a                   y0 = m0 + m1 + m2
    m1 = (x1 + x2) * (a + b + c) / 2     y1 = m1 - m2 - m3
    m2 = (x2 - x1) * (a - b + c) / 2
    m3 = (x1 - x3) * c

In two dimensions, these are 16 matrix products over the channels instead of 36.

The backward pass transforms the inputs again: kept, they would take four times the memory of the image. Its rule is
written out, because autodiff's took 1.3 times as long. All slices are static. In a loop over the columns of a tile,
whose slices are dynamic, training took 1.2 to 1.45 times as long with 32 -> 64 to 256 -> 256 channels. The loop needed
two thirds of the temporary memory and half the time to compile (one core of a Xeon, jax 0.10, both in turns).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

MULTIPLICATIONS = 16
"""Products of a tile for each pair of an input and an output channel."""

TRANSFORMATION = 1400
"""The time to transform the inputs or outputs of a tile in one channel, in multiplications of a matrix product.

Measured with 8 -> 16 to 256 -> 256 channels, forward and backward, on one core of a Xeon with AVX-512.
"""


def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve images, the batch being the last axis.

    Args:
        image: ``[C, 2 + 2 R, 2 + 2 S, N]`` for R x S tiles.
        kernel: ``[3, 3, C, O]``.

    Returns:
        ``[4 O, R S N]``: the outputs of the tiles, ordered by their place in the tile, upper left, upper right, lower
        left, lower right, and then by channel.
    """
    channels, height, width, batch = image.shape
    features = kernel.shape[3]
    rows, columns = (height - 2) // 2, (width - 2) // 2
    # Rows and columns with even and odd numbers apart, so that a place of all tiles is made of long contiguous runs.
    split = image.reshape(channels, rows + 1, 2, columns + 1, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    split = split.reshape(2, 2, channels, rows + 1, (columns + 1) * batch)
    kernels = jnp.stack([jnp.stack(_kernels(row)) for row in _kernels(kernel.swapaxes(2, 3))], axis=1)
    return _multiply(split, kernels, batch).reshape(4 * features, rows * columns * batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(image: jax.Array, kernels: jax.Array, batch: int) -> jax.Array:
    """``[2, 2, C, R + 1, (S + 1) N]`` and ``[column, row, O, C]`` to ``[4, O, R S N]``."""
    columns = [
        _outputs([kernel @ x for kernel, x in zip(*of_column, strict=True)])
        for of_column in zip(kernels, _transform(image, batch), strict=True)
    ]
    return jnp.stack([y for of_columns in zip(*columns, strict=True) for y in _outputs(of_columns)])


def _multiply_forward(
    image: jax.Array, kernels: jax.Array, batch: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(image, kernels, batch), (image, kernels)


def _multiply_backward(
    batch: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of the image and the kernels, from that of the outputs, ``[4, O, R S N]``.

    Its steps are the transposes of those of ``_multiply``, in reverse order.
    """
    image, kernels = residuals
    upper, lower = _outputs_gradient(gradient[:2]), _outputs_gradient(gradient[2:])
    of_kernels, of_columns = [], []
    for column, inputs in enumerate(_transform(image, batch)):
        products = _outputs_gradient([upper[column], lower[column]])
        of_kernels.append(jnp.stack([product @ x.T for product, x in zip(products, inputs, strict=True)]))
        of_inputs = [kernel.T @ product for kernel, product in zip(kernels[column], products, strict=True)]
        of_columns.append(_inputs_gradient(of_inputs))
    of_image = jnp.zeros_like(image)
    for row, of_row in enumerate(zip(*of_columns, strict=True)):
        for column, of_place in enumerate(_inputs_gradient(of_row)):
            place = _place(image, row, column, batch)
            of_image = of_image.at[place].add(of_place.reshape(of_image[place].shape))
    return of_image, jnp.stack(of_kernels)


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _transform(image: jax.Array, batch: int) -> list[list[jax.Array]]:
    """The transformed inputs of all tiles, ``[C, R S N]`` for each column and row of a tile."""
    rows = [_inputs([image[_place(image, row, column, batch)] for column in range(4)]) for row in range(4)]
    return [[x.reshape(len(x), -1) for x in _inputs(column)] for column in zip(*rows, strict=True)]


def _place(image: jax.Array, row: int, column: int, batch: int) -> tuple[int | slice, ...]:
    """The index into ``[2, 2, C, R + 1, (S + 1) N]`` of the numbers at a place of all tiles, ``[C, R, S N]``."""
    *_, rows, length = image.shape
    down, right = row // 2, column // 2 * batch
    return row % 2, column % 2, slice(None), slice(down, down + rows - 1), slice(right, right + length - batch)


def _kernels(taps: jax.Array) -> list[jax.Array]:
    """Transform three taps of a kernel along one dimension; this and the functions below are called for both."""
    a, b, c = taps
    return [a, (a + b + c) / 2, (a - b + c) / 2, c]


def _inputs(x: Sequence[jax.Array]) -> list[jax.Array]:
    """Transform four inputs."""
    return [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]


def _inputs_gradient(m: Sequence[jax.Array]) -> list[jax.Array]:
    """The gradient with respect to four inputs, from that with respect to the transformed ones."""
    return [m[0], m[1] - m[2] + m[3], m[1] + m[2] - m[0], -m[3]]


def _outputs(m: Sequence[jax.Array]) -> list[jax.Array]:
    """Add up four products to two outputs."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _outputs_gradient(y: Sequence[jax.Array]) -> list[jax.Array]:
    """The gradient with respect to four products, from that with respect to the two outputs."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
