"""The operations in their order, with their settings, and the random numbers that they need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.errors import UsageError, suggest
from cnn_jax.training.augment.arithmetic import per_image
from cnn_jax.training.augment.boxes import ATTEMPTS, random_erasing, random_resized_crop
from cnn_jax.training.augment.color import GRAY_WEIGHTS, color_jitter
from cnn_jax.training.augment.geometry import alternating_flips, mirror_where, random_flips, random_shift
from cnn_jax.training.augment.mixing import cutmix, mixup

Flip = Literal["none", "random", "alternating"]
"""Which images are mirrored."""

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
        uniform = draw(keys, self.random_operations())
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

    def random_operations(self) -> list[str]:
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
        return jnp.where(per_image(chosen), cut[0], mixed[0]), jnp.where(chosen, cut[1], mixed[1])


def draw(keys: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """Draw the random numbers of operations.

    Args:
        keys: random keys ``[B]``.
        names: keys of ``RANDOM_NUMBERS``.

    Returns:
        For each name, float32 ``[B, RANDOM_NUMBERS[name]]`` in [0, 1).
    """
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
