"""An exported file: verified before it is there."""

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cnn_jax import files
from cnn_jax.errors import CnnJaxError, UsageError, suggest
from cnn_jax.formats import FILE_NAMES, Format
from cnn_jax.formats.network import Classifier, Network
from cnn_jax.training.evaluation import batch_size_for

MAX_IMAGES = 300
"""Images on which a file is verified; fewer where they are large."""

MAX_BYTES = 1 << 25
"""Bytes of pixels in the images on which a file is verified."""

TOLERANCE = 1e-4
"""Of a probability; rounding in another order comes to a thousandth of it."""


class Verification(NamedTuple):
    """How well a file agrees with the network: the largest difference in any probability of so many images."""

    num_images: int
    largest_difference: float

    def __str__(self) -> str:
        return f"verified on {self.num_images} images, largest difference {self.largest_difference:.1e}"


class Form(Protocol):
    """What the module of each form offers."""

    def to_bytes(self, network: Network) -> bytes:
        """The file that holds a network."""

    def load(self, path: Path, network: Network) -> Classifier:
        """What a file computes; ``network`` is what is not in the file."""


def form_of(format: Format) -> Form:
    """The module of that form.

    Raises:
        UsageError: there is none, or what it needs is not installed.
    """
    match format:
        case "stablehlo":
            from cnn_jax.formats import stablehlo

            return stablehlo
        case "onnx":
            from cnn_jax.formats import onnx

            onnx.check_installed()
            return onnx
        case "safetensors":
            from cnn_jax.formats import safetensors

            return safetensors
        case "pytorch":
            from cnn_jax.formats import pytorch

            return pytorch
    raise UsageError(f"unknown format {format!r}{suggest(format, FILE_NAMES)}; formats: {', '.join(FILE_NAMES)}")


def check_new(path: Path) -> None:
    """Raise UsageError where there is something at the path already, or nothing can be written there."""
    try:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path} exists already: name another file by --output")
        path.parent.stat()
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): name another place by --output") from None


def sample_size(image_shape: tuple[int, int, int]) -> int:
    """The number of images ``(H, W, C)`` to verify with, at least two."""
    return max(2, min(MAX_IMAGES, MAX_BYTES // math.prod(image_shape)))


def sample(images: np.ndarray) -> np.ndarray:
    """The images to verify with, spread evenly: a data set may be sorted by class."""
    count = min(sample_size(images.shape[1:]), len(images))
    return images[np.arange(count) * len(images) // count]


def write(path: Path, form: Form, network: Network, images: np.ndarray, expected: np.ndarray) -> Verification:
    """Write a network, read it back, compare, and only then have the file take its place.

    Args:
        path: the file.
        form: of the file.
        network: what is written.
        images: uint8 ``[N, H, W, C]``.
        expected: float ``[N, classes]``: their probabilities.

    Raises:
        CnnJaxError: the file could not be written, or computes something else.
    """
    with _reporting(path), files.replacing(path) as unfinished:
        unfinished.write_bytes(form.to_bytes(network))
        difference = _largest_difference(form.load(unfinished, network), images, expected)
        if not difference <= TOLERANCE:  # also true of NaN
            raise CnnJaxError(
                f"{path} is not written: read back, it gives probabilities that differ by {difference:.1e} from the "
                f"network's, more than {TOLERANCE:g}; choose another --format, and report this"
            )
        check_new(path)  # again: another process may have been quicker
    return Verification(len(images), difference)


def _largest_difference(classifier: Classifier, images: np.ndarray, expected: np.ndarray) -> float:
    # The first image goes alone, so that more than one batch size is tried.
    batch_size = batch_size_for(images.shape[1:], len(images) - 1)
    pieces = (np.split(array, range(1, len(images), batch_size)) for array in (images, expected))
    return float(np.max([np.abs(classifier(piece) - right).max() for piece, right in zip(*pieces, strict=True)]))


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CnnJaxError(f"cannot write {path} ({error.strerror}): fix this, then export again") from None
