"""Verification of exported files before they are moved into place."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cnn_jax import files
from cnn_jax.data.streamed import Images
from cnn_jax.errors import CnnJaxError, UsageError, suggest
from cnn_jax.formats import FILE_NAMES, Format
from cnn_jax.formats.network import Classifier, Network
from cnn_jax.training.evaluation import batch_size_for

MAX_IMAGES = 300
"""Maximum number of images to verify a file with."""

MAX_BYTES = 1 << 23
"""Maximum size in bytes of the images to verify a file with: 55 of 224x224, of which a ResNet takes a minute."""

TOLERANCE = 1e-4
"""Largest accepted difference of a probability, about a thousand times the rounding errors."""


class Verification(NamedTuple):
    """How well an exported file agrees with the network.

    Attributes:
        num_images: images that were compared.
        largest_difference: largest absolute difference of any probability.
    """

    num_images: int
    largest_difference: float

    def __str__(self) -> str:
        return f"verified on {self.num_images} images, largest difference {self.largest_difference:.1e}"


class FormatModule(Protocol):
    """The interface of the module that implements a format."""

    def to_bytes(self, network: Network) -> bytes:
        """Convert a network to the content of a file."""

    def load(self, path: Path, network: Network) -> Classifier:
        """Load a file; ``network`` supplies what the format does not store."""


def format_module(format: Format, model: str | None = None) -> FormatModule:
    """Import the module that implements a format.

    Args:
        format: the format.
        model: the name of the architecture to export, or None to find out later whether it can be.

    Raises:
        UsageError: unknown format, a package it needs is not installed, or it does not support the model.
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

            if model is not None:
                pytorch.check_supported(model)
            return pytorch
    raise UsageError(f"unknown format {format!r}{suggest(format, FILE_NAMES)}; formats: {', '.join(FILE_NAMES)}")


def check_new(path: Path) -> None:
    """Raise UsageError if the path already exists, or its directory is missing or not writable."""
    try:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path} already exists: remove it, or choose another --output")
        with files.temporary_directory(path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): choose another --output") from None


def sample_size(image_shape: tuple[int, int, int]) -> int:
    """The number of images of shape ``(H, W, C)`` to verify a file with, at least two."""
    return max(2, min(MAX_IMAGES, MAX_BYTES // math.prod(image_shape)))


def sample(images: Images) -> np.ndarray:
    """Select evenly spaced images to verify a file with, because a dataset may be sorted by class."""
    count = min(sample_size(images.shape[1:]), len(images))
    return np.asarray(images[np.arange(count) * len(images) // count])


def write(path: Path, module: FormatModule, network: Network, images: np.ndarray, expected: np.ndarray) -> Verification:
    """Write a network to a temporary file, verify the file, and move it into place.

    Args:
        path: the file to write.
        module: the module that implements the format.
        network: the network to export.
        images: uint8 ``[N, H, W, C]``, to verify the file with.
        expected: float ``[N, classes]``, the network's probabilities for them.

    Raises:
        UsageError: the path already exists.
        CnnJaxError: the file could not be written, or its probabilities differ from the network's.
    """
    with _reporting(path), files.replacing(path) as unfinished:
        unfinished.write_bytes(module.to_bytes(network))
        difference = _largest_difference(module.load(unfinished, network), images, expected)
        if not difference <= TOLERANCE:  # also true of NaN
            raise CnnJaxError(
                f"{path} was not written: its probabilities differ from the network's by {difference:.1e}, more than "
                f"{TOLERANCE:g}; choose another --format, and report this as a bug"
            )
        check_new(path)  # again: another process may have created it
    return Verification(len(images), difference)


def _largest_difference(classifier: Classifier, images: np.ndarray, expected: np.ndarray) -> float:
    # The first image is a batch of its own, to verify more than one batch size.
    batch_size = batch_size_for(images.shape[1:], len(images) - 1)
    batches = (np.split(array, range(1, len(images), batch_size)) for array in (images, expected))
    return float(np.max([np.abs(classifier(batch) - target).max() for batch, target in zip(*batches, strict=True)]))


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CnnJaxError(f"cannot write {path} ({error.strerror}): fix this, then export again") from None
