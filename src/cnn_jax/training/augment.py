"""Random changes of the training images.

All of them run on the device, inside the compiled step. The random numbers of an image come from a key of its own, so
that they do not depend on how a batch is divided among devices. Each operation is a pure function of images and of
numbers between 0 and 1: a single call of the generator draws those for all operations, as each call takes XLA's CPU
compiler about a second.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.errors import UsageError, suggest

Flip = Literal["none", "random", "alternating"]
"""Which images are mirrored."""

ATTEMPTS = 10
"""How many times a rectangle is drawn until it fits into the image, as in torchvision."""

CROP_RATIOS = (3 / 4, 4 / 3)
"""Bounds of width / height of a random crop: torchvision's default."""

ERASED_AREAS = (0.02, 0.33)
"""Bounds of the fraction of an image that is erased: torchvision's default."""

ERASED_RATIOS = (0.3, 3.3)
"""Bounds of height / width of an erased rectangle: torchvision's default."""

RANDOM_NUMBERS = {
    "flip": 1,
    "shift": 2,
    "color_jitter": 3,
    "mixup": 2,
    "cutmix": 4,
    "mixup or cutmix": 1,
    "random_resized_crop": 2 * ATTEMPTS + 2,
    "random_erasing": 2 * ATTEMPTS + 3,
}
"""How many random numbers each operation needs for an image."""

GRAY_WEIGHTS = (0.299, 0.587, 0.114)
"""Red, green and blue in the gray value, from ITU-R BT.601: https://www.itu.int/rec/R-REC-BT.601."""


class Mixed(NamedTuple):
    """Augmented examples, whose loss is ``weight * loss(labels) + (1 - weight) * loss(other_labels)``.

    Attributes:
        images: uint8 ``[B, H, W, C]``.
        other_labels: int32 ``[B]``, the label of the other image that is mixed in, or the own label.
        weight: float32 ``[B]`` in [0, 1], of the own label; 1 without mixing.
    """

    images: jax.Array
    other_labels: jax.Array
    weight: jax.Array


class Boxes(NamedTuple):
    """A rectangle in each image of a batch; every field is int32 ``[B]``, in pixels."""

    top: jax.Array
    left: jax.Array
    height: jax.Array
    width: jax.Array


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images; a hashable value, static to ``jax.jit``.

    Operations are applied in the order flip, crop, shift, color, erasing, mixing. What is off is not in the compiled
    program, and does not change the random numbers of the others.

    Attributes:
        flip: mirror images left to right: with probability 1/2 (``random_flips``), or every image in every other epoch
            (``alternating_flips``).
        shift: the largest shift in pixels in each direction; see ``random_shift``.
        random_resized_crop: the smallest part of the area that is kept; 1 is off. See ``random_resized_crop``.
        random_erasing: the probability that a rectangle is erased; see ``random_erasing``.
        color_jitter: the strength of changes of brightness, contrast and saturation; see ``color_jitter``.
        mixup: the parameter of the beta distribution of the weights; 0 is off. See ``mixup``.
        cutmix: the parameter of the beta distribution of the areas; 0 is off. See ``cutmix``. With ``mixup``, each
            pair of images goes through one of the two, with probability 1/2.
    """

    flip: Flip = "none"
    shift: int = 0
    random_resized_crop: float = 1.0
    random_erasing: float = 0.0
    color_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def is_identity(self) -> bool:
        """Whether everything is off."""
        return self == Augment()

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that ``weight`` may be less than 1."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Check the settings for images of a shape ``(H, W, C)``.

        Raises:
            UsageError: a setting is out of range or impossible for these images.
        """
        if self.flip not in get_args(Flip):
            known = get_args(Flip)
            raise UsageError(f"unknown flip {self.flip!r}{suggest(self.flip, known)}; choices: {', '.join(known)}")
        for name, valid, expected in (
            ("shift", self.shift >= 0, "at least 0"),
            ("random_resized_crop", 0 < self.random_resized_crop <= 1, "more than 0 and at most 1"),
            ("random_erasing", 0 <= self.random_erasing <= 1, "from 0 to 1"),
            ("color_jitter", 0 <= self.color_jitter < math.inf, "a number of at least 0"),
            ("mixup", 0 <= self.mixup < math.inf, "a number of at least 0"),
            ("cutmix", 0 <= self.cutmix < math.inf, "a number of at least 0"),
        ):
            if not valid:
                raise UsageError(f"{name} must be {expected}, got {getattr(self, name)}")
        height, width, channels = image_shape
        largest = min(height, width) - 1
        if self.shift > largest:
            raise UsageError(
                f"cannot shift images of {height}x{width} pixels by {self.shift}: set --shift to at most {largest}"
            )
        if self.color_jitter > 0 and channels not in (1, len(GRAY_WEIGHTS)):
            raise UsageError(f"color_jitter needs images with 1 or 3 channels, not {channels}: set it to 0")

    def __call__(self, images: jax.Array, labels: jax.Array, keys: jax.Array, epoch: jax.Array) -> Mixed:
        """Augment a batch.

        Images are mixed in pairs of neighbors: the first with the second, the third with the fourth, and so on. In an
        odd batch, the last image is its own partner. In shuffled batches, pairs are random. The result does not
        depend on how a batch is divided among devices if every part is even.

        Args:
            images: uint8 ``[B, H, W, C]``.
            labels: int32 ``[B]``.
            keys: random keys ``[B]``, such as ``BatchContext.keys`` makes; the result is a function of them.
            epoch: int32 scalar, counted from 0.

        Raises:
            UsageError: a setting is out of range or impossible for these images.
        """
        self.check(images.shape[1:])
        size = len(labels)
        partner = np.minimum(np.arange(size) ^ 1, size - 1)
        other_labels, weight = labels, jnp.ones(size, jnp.float32)
        uniform = _draw(keys, self._random())
        if self.flip == "random":
            images = mirror_where(random_flips(uniform["flip"]), images)
        if self.flip == "alternating":
            images = mirror_where(alternating_flips(images, epoch), images)
        if self.random_resized_crop < 1:
            images = random_resized_crop(images, uniform["random_resized_crop"], self.random_resized_crop)
            images = _unfused(images, epoch)
        if self.shift > 0:
            images = _unfused(random_shift(images, uniform["shift"], self.shift), epoch)
        if self.color_jitter > 0:
            images = _unfused(color_jitter(images, uniform["color_jitter"], self.color_jitter), epoch)
        if self.random_erasing > 0:
            images = random_erasing(images, uniform["random_erasing"], self.random_erasing)
        if self.mixes:
            images = _unfused(images, epoch)
            # Both images of a pair use the numbers of the first, so that together they still hold all of both.
            paired = {name: numbers[np.arange(size) & ~1] for name, numbers in uniform.items()}
            images, weight = self._mix(images, images[partner], paired)
            other_labels = labels[partner]
        return Mixed(images if self.is_identity else _unfused(images, epoch), other_labels, weight)

    def _random(self) -> list[str]:
        """The operations that need random numbers."""
        on = {
            "flip": self.flip == "random",
            "mixup or cutmix": self.mixup > 0 and self.cutmix > 0,
            "random_resized_crop": self.random_resized_crop < 1,
        }
        return [name for name in RANDOM_NUMBERS if (on[name] if name in on else getattr(self, name) > 0)]

    def _mix(self, images: jax.Array, others: jax.Array, uniform: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if self.cutmix == 0:
            return mixup(images, others, uniform["mixup"], self.mixup)
        cut = cutmix(images, others, uniform["cutmix"], self.cutmix)
        if self.mixup == 0:
            return cut
        mixed = mixup(images, others, uniform["mixup"], self.mixup)
        chosen = uniform["mixup or cutmix"][:, 0] < 0.5
        return jnp.where(_per_image(chosen), cut[0], mixed[0]), jnp.where(chosen, cut[1], mixed[1])


def mirror_where(condition: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror images ``[B, H, W, C]`` left to right where ``condition``, bool ``[B]``, is true."""
    return jnp.where(_per_image(condition), images[:, :, ::-1], images)


def random_flips(uniform: jax.Array) -> jax.Array:
    """Which images to mirror: each with probability 1/2. Random numbers ``[B, 1]`` to bool ``[B]``."""
    return uniform[:, 0] < 0.5


def alternating_flips(images: jax.Array, epoch: jax.Array) -> jax.Array:
    """Which images to mirror: about half in epoch 0, each image in every other epoch.

    So any two consecutive epochs show every image both ways, which random flips do for half of the images
    (https://arxiv.org/abs/2404.00498). A bit of a hash of the pixels decides which half is first, as a batch does not
    tell which image is which: copies of an image are mirrored together, and the choice is the same for all seeds.

    Args:
        images: uint8 ``[B, H, W, C]`` before any random change.
        epoch: int32 scalar, counted from 0.

    Returns:
        bool ``[B]``.
    """
    pixels = images.reshape(len(images), -1).astype(jnp.uint32)
    # The sum modulo 2**32 of the pixels, each times a scrambled index. All of them influence the top bit.
    factors = (jax.lax.iota(jnp.uint32, pixels.shape[1]) + 1) * jnp.uint32(0x9E3779B1)
    factors = (factors ^ (factors >> 15)) * jnp.uint32(0x85EBCA77)
    factors = factors ^ (factors >> 13)
    hashes = jnp.sum(pixels * factors.reshape(1, -1), axis=1, dtype=jnp.uint32)
    return (hashes >> 31).astype(jnp.int32) != epoch % 2


def random_shift(images: jax.Array, uniform: jax.Array, pixels: int) -> jax.Array:
    """Shift images by up to ``pixels`` in each direction: a random crop of the image padded by reflection.

    All ``(2 pixels + 1) ** 2`` shifts are equally probable. As in airbench, https://arxiv.org/abs/2404.00498.

    Args:
        images: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 2]``.
        pixels: less than ``H`` and ``W``.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    count = jnp.full(len(images), 2 * pixels + 1, jnp.int32)
    top, left = _random_below(uniform[:, 0], count), _random_below(uniform[:, 1], count)
    # One slice per image: on a CPU as fast as selects between slices of the batch, and faster for large shifts.
    crop = jax.vmap(lambda image, top, left: jax.lax.dynamic_slice(image, (top, left, jnp.int32(0)), images.shape[1:]))
    return crop(padded, top, left)


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
    area = _between(uniform[:, :ATTEMPTS], min_area, 1.0) * (height * width)
    ratio = jnp.exp(_between(uniform[:, ATTEMPTS:-2], *map(math.log, CROP_RATIOS)))
    box_width = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    box_height = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    low, high = CROP_RATIOS
    central_height = min(height, max(1, round(width / low)))
    central_width = min(width, max(1, round(height * high)))
    found = fits.any(axis=1)
    box_height = jnp.where(found, _first(fits, box_height), central_height)
    box_width = jnp.where(found, _first(fits, box_width), central_width)
    top = jnp.where(found, _random_below(uniform[:, -2], height - box_height + 1), (height - central_height) // 2)
    left = jnp.where(found, _random_below(uniform[:, -1], width - box_width + 1), (width - central_width) // 2)
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
    return _to_uint8(jnp.einsum("blk,bikc->bilc", columns, pixels, precision=exact))


def color_jitter(images: jax.Array, uniform: jax.Array, strength: float) -> jax.Array:
    """Change brightness, contrast and saturation, each by a random factor; see ``adjust_color``.

    The factors are uniform from ``max(0, 1 - strength)`` to ``1 + strength``, as in torchvision's
    ``ColorJitter(strength, strength, strength)``. Unlike there, the order is fixed. There is no change of hue, which
    costs a conversion to HSV and back.

    Args:
        images: uint8 ``[B, H, W, C]`` with 1 or 3 channels.
        uniform: random numbers ``[B, 3]``.
        strength: at least 0.

    Returns:
        uint8 ``[B, H, W, C]``.
    """
    factors = _between(uniform, max(0.0, 1 - strength), 1 + strength)
    return adjust_color(images, factors[:, 0], factors[:, 1], factors[:, 2])


def adjust_color(images: jax.Array, brightness: jax.Array, contrast: jax.Array, saturation: jax.Array) -> jax.Array:
    """Scale brightness, then contrast, then saturation.

    Each blends the image with another, ``factor * image + (1 - factor) * other``, and limits the result to [0, 255], as
    torchvision's ``adjust_brightness``, ``adjust_contrast`` and ``adjust_saturation``: with black, with the mean of the
    image's gray values, and with its gray values (``GRAY_WEIGHTS``). Saturation leaves images of one channel as they
    are. Values are rounded once at the end, to the nearest, while torchvision rounds down after each operation.

    Args:
        images: uint8 ``[B, H, W, C]`` with 1 or 3 channels.
        brightness: float32 ``[B]``, at least 0.
        contrast: float32 ``[B]``, at least 0.
        saturation: float32 ``[B]``, at least 0.

    Returns:
        uint8 ``[B, H, W, C]``.
    """

    # Whole planes for each channel: on a CPU several times as fast as with the channels of a pixel side by side.
    planes = jnp.moveaxis(images, 3, 0).reshape(images.shape[3], len(images), -1)
    planes = jax.lax.optimization_barrier(planes).astype(jnp.float32)

    def gray(planes: jax.Array) -> jax.Array:
        if len(planes) == 1:
            return planes
        red, green, blue = (plane * weight for plane, weight in zip(planes, GRAY_WEIGHTS, strict=True))
        return (red + green + blue)[jnp.newaxis]

    def blend(planes: jax.Array, other: jax.Array | float, factor: jax.Array) -> jax.Array:
        factor = factor.reshape(1, -1, 1)
        return jnp.clip(factor * planes + (1 - factor) * other, 0, 255)

    planes = blend(planes, 0.0, brightness)
    planes = blend(planes, gray(planes).mean(axis=2, keepdims=True), contrast)
    if len(planes) > 1:
        planes = blend(planes, gray(planes), saturation)
    planes = jax.lax.optimization_barrier(_to_uint8(planes))
    return jnp.moveaxis(planes, 0, 2).reshape(images.shape)


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
    inside = _inside(erasing_boxes(uniform, images.shape[1], images.shape[2], probability), images.shape)
    sums = jnp.sum(images, axis=(1, 2), keepdims=True, dtype=jnp.int32)
    mean = _to_uint8(sums.astype(jnp.float32) / (images.shape[1] * images.shape[2]))
    return jnp.where(inside, mean, images)


def erasing_boxes(uniform: jax.Array, height: int, width: int, probability: float) -> Boxes:
    """Random rectangles in images of ``height`` times ``width`` pixels, from random numbers ``[B, 23]``.

    With probability ``1 - probability``, a rectangle is empty. Otherwise, the area is uniform within ``ERASED_AREAS``,
    the logarithm of height / width is uniform within ``ERASED_RATIOS``, and all positions are equally probable. If none
    of ``ATTEMPTS`` rectangles is smaller than the image in both directions, it is empty.
    """
    area = _between(uniform[:, :ATTEMPTS], *ERASED_AREAS) * (height * width)
    ratio = jnp.exp(_between(uniform[:, ATTEMPTS:-3], *map(math.log, ERASED_RATIOS)))
    box_height = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    box_width = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (box_height < height) & (box_width < width) & (uniform[:, -1:] < probability)
    box_height, box_width = _first(fits, box_height), _first(fits, box_width)
    top = _random_below(uniform[:, -3], height - box_height + 1)
    left = _random_below(uniform[:, -2], width - box_width + 1)
    return Boxes(top, left, box_height, box_width)


def mixup(images: jax.Array, others: jax.Array, uniform: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Blend each image with another, with weights from Beta(alpha, alpha): https://arxiv.org/abs/1710.09412.

    The paper draws one weight for a batch; here each image has its own.

    Args:
        images: uint8 ``[B, H, W, C]``.
        others: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 2]``.
        alpha: positive.

    Returns:
        ``weight * images + (1 - weight) * others``, rounded to uint8 ``[B, H, W, C]``, and the weight, float32 ``[B]``.
    """
    weight = symmetric_beta(uniform, alpha)
    factor = _per_image(weight)
    return _to_uint8(factor * images.astype(jnp.float32) + (1 - factor) * others.astype(jnp.float32)), weight


def cutmix(images: jax.Array, others: jax.Array, uniform: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Replace a rectangle in each image by that of another: https://arxiv.org/abs/1905.04899.

    The rectangle has the image's ratio of height and width. Its center is uniform in the image, and its area is
    a fraction of the image's from Beta(alpha, alpha), less what is outside the image. The paper draws one rectangle for
    a batch; here each image has its own.

    Args:
        images: uint8 ``[B, H, W, C]``.
        others: uint8 ``[B, H, W, C]``.
        uniform: random numbers ``[B, 4]``.
        alpha: positive.

    Returns:
        uint8 ``[B, H, W, C]``, and the exact fraction of pixels of ``images`` in it, float32 ``[B]``.
    """
    height, width = images.shape[1:3]
    half_side = 0.5 * jnp.sqrt(1 - symmetric_beta(uniform[:, :2], alpha))

    def cut(size: int, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
        center = _random_below(uniform, jnp.full(len(images), size, jnp.int32))
        half = (half_side * size).astype(jnp.int32)
        start = jnp.maximum(center - half, 0)
        return start, jnp.minimum(center + half, size) - start

    top, box_height = cut(height, uniform[:, 2])
    left, box_width = cut(width, uniform[:, 3])
    inside = _inside(Boxes(top, left, box_height, box_width), images.shape)
    weight = 1 - (box_height * box_width).astype(jnp.float32) / (height * width)
    return jnp.where(inside, others, images), weight


def symmetric_beta(uniform: jax.Array, alpha: float) -> jax.Array:
    """Numbers from Beta(alpha, alpha), in [0, 1]. Random numbers ``[B, 2]`` to float32 ``[B]``.

    From a number T of Student's t-distribution with ``2 alpha`` degrees of freedom, which Bailey's polar method makes
    of two uniform ones: ``(1 + T / sqrt(2 alpha + T ** 2)) / 2`` (Devroye, "Random variate generation in one line of
    code", 1996: https://doi.org/10.1145/256562.256623). Unlike ``jax.random.beta``, it has no loop.
    """
    log_power = jnp.log(uniform[:, 0]) / alpha
    cosine = jnp.cos(2 * math.pi * uniform[:, 1])
    scaled = -jnp.expm1(log_power) * jnp.square(cosine)
    # T ** 2 / (2 alpha + T ** 2), where T ** 2 = 2 alpha scaled / power
    root = jnp.sqrt(scaled / jnp.maximum(jnp.exp(log_power) + scaled, jnp.finfo(jnp.float32).tiny))
    return 0.5 * (1 + jnp.sign(cosine) * root)


def _draw(keys: jax.Array, names: Iterable[str]) -> dict[str, jax.Array]:
    """Draw the random numbers of operations: for each name, float32 ``[B, RANDOM_NUMBERS[name]]`` in [0, 1)."""
    stops = dict(zip(RANDOM_NUMBERS, accumulate(RANDOM_NUMBERS.values()), strict=True))
    count = max((stops[name] for name in names), default=0)
    if count == 0:
        return {}
    # A number depends on its place, not on how many are drawn, so that it does not depend on other operations.
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)
    return {name: uniform[:, stops[name] - RANDOM_NUMBERS[name] : stops[name]] for name in names}


def _unfused(images: jax.Array, epoch: jax.Array) -> jax.Array:
    """``images`` itself, computed once before it is used, also on a CPU.

    XLA's CPU compiler fuses a chain of operations into a loop over the pixels of the last one, which computes a pixel
    of the first one as often as it is read: up to 20 times as slow. It ignores ``jax.lax.optimization_barrier``, but
    does not fuse across a branch.
    """

    def branch(images: jax.Array) -> jax.Array:
        # Always true, which the compiler does not know.
        return jax.lax.cond(epoch >= 0, lambda x: x, lambda x: x ^ x, images)

    return jax.lax.platform_dependent(images, cpu=branch, default=lambda x: x)


def _between(uniform: jax.Array, low: float, high: float) -> jax.Array:
    """Scale numbers in [0, 1) to [low, high)."""
    return low + (high - low) * uniform


def _random_below(uniform: jax.Array, count: jax.Array) -> jax.Array:
    """Convert numbers in [0, 1) to integers from 0 to ``count - 1``, int32 as ``count``."""
    # The product may be rounded up to count.
    return jnp.minimum((uniform * count.astype(jnp.float32)).astype(jnp.int32), count - 1)


def _first(condition: jax.Array, values: jax.Array) -> jax.Array:
    """For each row of ``[B, N]``, the value in the first column where the condition is true, or 0 if there is none."""
    columns = jnp.arange(condition.shape[1], dtype=jnp.int32).reshape(1, -1)
    first = jnp.min(jnp.where(condition, columns, condition.shape[1]), axis=1, keepdims=True)
    return jnp.sum(jnp.where(columns == first, values, 0), axis=1, dtype=jnp.int32)


def _per_image(values: jax.Array) -> jax.Array:
    """``[B]`` to ``[B, 1, 1, 1]``."""
    return values.reshape(-1, 1, 1, 1)


def _inside(boxes: Boxes, shape: tuple[int, ...]) -> jax.Array:
    """Which pixels are in the boxes: bool ``[B, H, W, 1]`` for images of shape ``[B, H, W, C]``."""
    rows = jnp.arange(shape[1], dtype=jnp.int32).reshape(1, -1, 1, 1)
    columns = jnp.arange(shape[2], dtype=jnp.int32).reshape(1, 1, -1, 1)
    top, left, height, width = map(_per_image, boxes)
    return ((rows >= top) & (rows < top + height)) & ((columns >= left) & (columns < left + width))


def _interpolation(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Matrices ``[B, size, size]`` that resize ``length`` pixels from ``start`` on to ``size`` pixels, as float32."""
    start, length = (values.astype(jnp.float32).reshape(-1, 1, 1) for values in (start, length))
    scale = length / size
    centers = (jnp.arange(size, dtype=jnp.float32).reshape(1, -1, 1) + 0.5) * scale - 0.5
    sources = jnp.arange(size, dtype=jnp.float32).reshape(1, 1, -1) - start
    weights = jnp.maximum(1 - jnp.abs(centers - sources), 0)
    weights = jnp.where((sources >= 0) & (sources < length), weights, 0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def _to_uint8(pixels: jax.Array) -> jax.Array:
    """Round to the nearest integer in [0, 255]."""
    return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)
