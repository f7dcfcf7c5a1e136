"""Random rectangles in images: to crop, to erase, or to replace by those of other images."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cnn_jax.training.augment.arithmetic import between, per_image, random_below, to_uint8

ATTEMPTS = 10
"""How many times a rectangle is drawn until it fits into the image, as in torchvision."""

CROP_RATIOS = (3 / 4, 4 / 3)
"""Bounds of width / height of a random crop: torchvision's default."""

ERASED_AREAS = (0.02, 0.33)
"""Bounds of the fraction of an image that is erased: torchvision's default."""

ERASED_RATIOS = (0.3, 3.3)
"""Bounds of height / width of an erased rectangle: torchvision's default."""


class Boxes(NamedTuple):
    """A rectangle in each image of a batch; every field is int32 ``[B]``, in pixels."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array


def random_resized_crop(images: jax.Array, uniform: jax.Array, min_area: float) -> jax.Array:
    """Resize a random part of each image to the size of the whole.

    The part and the resizing are those of torchvision's ``RandomResizedCrop``: see ``crop_boxes`` and
    ``resize_boxes``. From https://arxiv.org/abs/1409.4842, section 6.

    Args:
        images: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 22]``.
        min_area: smallest fraction of the area.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    return resize_boxes(images, crop_boxes(uniform, images.shape[1], images.shape[2], min_area))


def crop_boxes(uniform: jax.Array, height: int, width: int, min_area: float) -> Boxes:
    """Random parts of images of ``height`` times ``width`` pixels, from random numbers ``[B, 22]``.

    The area is uniform from ``min_area`` to 1 times that of the image, the logarithm of width / height is uniform
    within ``CROP_RATIOS``, and all positions are equally probable. If none of ``ATTEMPTS`` rectangles fits into the
    image, it is the largest rectangle in the middle with an admissible ratio.
    """
    area = between(uniform[:, :ATTEMPTS], min_area, 1.0) * (height * width)
    ratio = jnp.exp(between(uniform[:, ATTEMPTS:-2], *map(math.log, CROP_RATIOS)))
    box_width = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    box_height = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    low, high = CROP_RATIOS
    central_height = min(height, max(1, round(width / low)))
    central_width = min(width, max(1, round(height * high)))
    found = fits.any(axis=1)
    box_height = jnp.where(found, _first_where(fits, box_height), central_height)
    box_width = jnp.where(found, _first_where(fits, box_width), central_width)
    top = jnp.where(found, random_below(uniform[:, -2], height - box_height + 1), (height - central_height) // 2)
    left = jnp.where(found, random_below(uniform[:, -1], width - box_width + 1), (width - central_width) // 2)
    return Boxes(top, left, box_height, box_width)


def resize_boxes(images: jax.Array, boxes: Boxes) -> jax.Array:
    """Resize a part of each image to the size of the whole, by linear interpolation.

    As ``torch.nn.functional.interpolate(mode="bilinear")`` of the part: pixels around it have no influence, unlike in
    ``jax.image.scale_and_translate``. As no part is larger than the result, there is nothing to antialias. Values are
    rounded once, to the nearest.

    Args:
        images: uint8 ``[B, H, W, C]``.
        boxes: rectangles of at least one pixel inside the images.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    rows = _interpolation(boxes.top, boxes.height, images.shape[1])
    columns = _interpolation(boxes.left, boxes.width, images.shape[2])
    # GPUs and TPUs would round the factors to fewer bits than a uint8 result needs.
    exact = jax.lax.Precision.HIGHEST
    pixels = jnp.einsum("bij,bjkc->bikc", rows, images.astype(jnp.float32), precision=exact)
    return to_uint8(jnp.einsum("blk,bikc->bilc", columns, pixels, precision=exact))


def _first_where(condition: jax.Array, values: jax.Array) -> jax.Array:
    """For each row of ``[B, N]``, the value in the first column where the condition is true, or 0 if there is none."""
    columns = jnp.arange(condition.shape[1], dtype=jnp.int32).reshape(1, -1)
    first = jnp.min(jnp.where(condition, columns, condition.shape[1]), axis=1, keepdims=True)
    return jnp.sum(jnp.where(columns == first, values, 0), axis=1, dtype=jnp.int32)


def _interpolation(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Matrices ``[B, size, size]`` that resize ``length`` pixels from ``start`` on to ``size`` pixels, as float32."""
    start, length = (values.astype(jnp.float32).reshape(-1, 1, 1) for values in (start, length))
    scale = length / size
    centers = (jnp.arange(size, dtype=jnp.float32).reshape(1, -1, 1) + 0.5) * scale - 0.5
    sources = jnp.arange(size, dtype=jnp.float32).reshape(1, 1, -1) - start
    weights = jnp.maximum(1 - jnp.abs(centers - sources), 0)
    weights = jnp.where((sources >= 0) & (sources < length), weights, 0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def random_erasing(images: jax.Array, uniform: jax.Array, probability: float) -> jax.Array:
    """Fill a random rectangle with the mean color of the image, in some of the images.

    From https://arxiv.org/abs/1708.04896, with torchvision's rectangles: see ``erasing_boxes``. The mean color adds no
    contrast of its own in any dataset. torchvision's 0 is black here, as images are standardized later. The paper's
    random values need a random number for each pixel, which takes longer than all other operations together.

    Args:
        images: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 23]``.
        probability: of erasing.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    inside = pixels_in(erasing_boxes(uniform, images.shape[1], images.shape[2], probability), images.shape)
    sums = jnp.sum(images, axis=(1, 2), keepdims=True, dtype=jnp.int32)
    mean = to_uint8(sums.astype(jnp.float32) / (images.shape[1] * images.shape[2]))
    return jnp.where(inside, mean, images)


def erasing_boxes(uniform: jax.Array, height: int, width: int, probability: float) -> Boxes:
    """Random rectangles in images of ``height`` times ``width`` pixels, from random numbers ``[B, 23]``.

    With probability ``1 - probability``, a rectangle is empty. Otherwise, the area is uniform within ``ERASED_AREAS``,
    the logarithm of height / width is uniform within ``ERASED_RATIOS``, and all positions are equally probable. If none
    of ``ATTEMPTS`` rectangles is smaller than the image in both directions, it is empty.
    """
    area = between(uniform[:, :ATTEMPTS], *ERASED_AREAS) * (height * width)
    ratio = jnp.exp(between(uniform[:, ATTEMPTS:-3], *map(math.log, ERASED_RATIOS)))
    box_height = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (box_height < height) & (box_width < width) & (uniform[:, -1:] < probability)
    box_height, box_width = _first_where(fits, box_height), _first_where(fits, box_width)
    top = random_below(uniform[:, -3], height - box_height + 1)
    left = random_below(uniform[:, -2], width - box_width + 1)
    return Boxes(top, left, box_height, box_width)


def pixels_in(boxes: Boxes, shape: tuple[int, ...]) -> jax.Array:
    """Which pixels are in the boxes: bool ``[B, H, W, 1]`` for images of shape ``[B, H, W, C]``."""
    rows = jnp.arange(shape[1], dtype=jnp.int32).reshape(1, -1, 1, 1)
    columns = jnp.arange(shape[2], dtype=jnp.int32).reshape(1, 1, -1, 1)
    top, left, height, width = map(per_image, boxes)
    return ((rows >= top) & (rows < top + height)) & ((columns >= left) & (columns < left + width))
