"""The one form in which every data source hands over its examples."""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        images: uint8 ``[N, H, W, C]``, as stored: scaling to floats belongs to the training step.
        labels: int32 ``[N]``, each in ``[0, number of classes)``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set by the name that was resolved (never ``auto``): its splits and its class names."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)`` of every image."""
        return self.train.images.shape[1:]

    @property
    def sha256(self) -> str:
        """Of every image and label in their order, and of the class names: another data set has another."""
        digest = hashlib.sha256(repr((self.image_shape, self.class_names)).encode(errors="surrogatepass"))
        for split in (self.train, self.test):
            digest.update(np.ascontiguousarray(split.images))
            digest.update(np.ascontiguousarray(split.labels))
        return digest.hexdigest()
