"""3x3 convolution with Winograd's minimal filtering (Lavin & Gray, https://arxiv.org/abs/1509.09308), F(2x2, 3x3).

A tile of 4x4 inputs gives 2x2 outputs. In one dimension, four products ``m`` of transformed inputs and a transformed
kernel ``(a, b, c)`` give two outputs, where six products would be needed otherwise::

    m0 = (x0 - x2) * a                   y0 = m0 + m1 + m2
    m1 = (x1 + x2) * (a + b + c) / 2     y1 = m1 - m2 - m3
    m2 = (x2 - x1) * (a - b + c) / 2
    m3 = (x1 - x3) * c

In two dimensions, these are 16 matrix products over the channels instead of 36. A loop over the four columns of a tile
transforms the inputs, multiplies and adds up the outputs. So a quarter of the transformed numbers exist at a time, and
the backward pass transforms the inputs again instead of keeping them.
"""

import jax
import jax.numpy as jnp
from jax import lax

INPUTS = ((0, 2), (1, 2), (2, 1), (1, 3))
"""The two places of a tile that each transformed input is made of."""

SIGNS = ((1, -1), (1, 1), (1, -1), (1, -1))
"""The signs of these two."""

KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
"""The transformation of the kernel."""

OUTPUTS = ((1, 0), (1, 1), (1, -1), (0, -1))
"""The factors with which each product is added to the two outputs."""

MULTIPLICATIONS = 16
"""Products of a tile for each pair of an input and an output channel."""

TRANSFORMATION = 1040
"""The time to transform the inputs or outputs of a tile in one channel, in multiplications of a matrix product.

Measured with 16 -> 32 to 256 -> 256 channels, forward and backward, on one core of an AMD EPYC.
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
    # Rows and columns with even and odd numbers apart, so that a place of all tiles is a contiguous part.
    split = image.reshape(channels, rows + 1, 2, columns + 1, 2, batch).transpose(2, 4, 0, 1, 3, 5)
    transform = jnp.asarray(KERNEL, kernel.dtype)
    kernels = jnp.einsum("ia,jb,abco->jioc", transform, transform, kernel)
    return _multiply(split, kernels).reshape(4 * features, rows * columns * batch)


@jax.custom_vjp
def _multiply(image: jax.Array, kernels: jax.Array) -> jax.Array:
    """``[2, 2, C, R + 1, S + 1, N]`` and ``[column, row, O, C]`` to ``[2, 2, O, R S N]``."""
    numbers = image[0, 0, 0, 1:, 1:].size

    def add_column(outputs: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, kernels = column
        products = [kernel @ inputs for kernel, inputs in zip(kernels, _inputs(image, index), strict=True)]
        upper, lower = products[0] + products[1] + products[2], products[1] - products[2] - products[3]
        factors = jnp.asarray(OUTPUTS, image.dtype)[index].reshape(1, 2, 1, 1)
        return outputs + factors * jnp.stack([upper, lower])[:, jnp.newaxis], None

    zeros = jnp.zeros((2, 2, kernels.shape[2], numbers), image.dtype)
    outputs, _ = lax.scan(add_column, zeros, (jnp.arange(4), kernels))
    return outputs


def _multiply_forward(image: jax.Array, kernels: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _multiply(image, kernels), (image, kernels)


def _multiply_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    image, kernels = residuals

    def add_column(total: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, kernels = column
        factors = jnp.asarray(OUTPUTS, image.dtype)[index]
        upper, lower = factors[0] * gradient[:, 0] + factors[1] * gradient[:, 1]
        products = [upper, upper + lower, upper - lower, -lower]
        of_kernels = [product @ inputs.T for product, inputs in zip(products, _inputs(image, index), strict=True)]
        of_inputs = [kernel.T @ product for kernel, product in zip(kernels, products, strict=True)]
        return _add_inputs(total, of_inputs, index), jnp.stack(of_kernels)

    return lax.scan(add_column, jnp.zeros_like(image), (jnp.arange(4), kernels))


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _inputs(image: jax.Array, column: jax.Array) -> list[jax.Array]:
    """The transformed inputs of all tiles in one column: ``[C, R S N]`` for each of the four rows."""
    first, second = (jnp.asarray(INPUTS)[column][number] for number in range(2))
    signs = jnp.asarray(SIGNS, image.dtype)[column]
    of_rows = [signs[0] * _place(image, row, first) + signs[1] * _place(image, row, second) for row in range(4)]
    return [
        sign1 * of_rows[place1] + sign2 * of_rows[place2]
        for (place1, place2), (sign1, sign2) in zip(INPUTS, SIGNS, strict=True)
    ]


def _add_inputs(image: jax.Array, gradients: list[jax.Array], column: jax.Array) -> jax.Array:
    """Add to ``image`` the gradients with respect to ``_inputs``: its transpose."""
    signs = jnp.asarray(SIGNS, image.dtype)[column]
    for row in range(4):
        terms = [
            signs_of_row[places.index(row)] * gradient
            for gradient, places, signs_of_row in zip(gradients, INPUTS, SIGNS, strict=True)
            if row in places
        ]
        for number in range(2):
            start, shape = _part(image, row, jnp.asarray(INPUTS)[column][number])
            old = lax.dynamic_slice(image, start, shape)
            image = lax.dynamic_update_slice(image, old + (signs[number] * sum(terms)).reshape(shape), start)
    return image


def _place(image: jax.Array, row: int, column: jax.Array) -> jax.Array:
    """The numbers at a place of all tiles, ``[C, R S N]``."""
    start, shape = _part(image, row, column)
    return lax.dynamic_slice(image, start, shape).reshape(shape[2], -1)


def _part(image: jax.Array, row: int, column: jax.Array) -> tuple[tuple[jax.Array | int, ...], tuple[int, ...]]:
    """Where a place of all tiles begins in ``[2, 2, C, R + 1, S + 1, N]``, and its shape."""
    _, _, channels, rows, columns, batch = image.shape
    start = (row % 2, column % 2, 0, row // 2, column // 2, 0)
    return start, (1, 1, channels, rows - 1, columns - 1, batch)
