"""The form in which every data source returns its examples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from cnn_jax.data.streamed import Images
from cnn_jax.errors import UsageError

Arrays = tuple[ArrayLike, ArrayLike]
"""Images and labels."""


@dataclass(frozen=True)
class Split:
    """Labeled images.

    Attributes:
        images: uint8 ``[N, H, W, C]``, as stored: the training step scales them to floats.
        labels: int32 ``[N]``, each in ``[0, number of classes)``.
        files: str objects ``[N]``, the file of each image within the dataset's folder; None if it is not a folder.
        digests: bytes objects ``[N]``, the SHA-256 digest of the encoded form of each image; None if there is none.
    """

    images: Images
    labels: np.ndarray
    files: np.ndarray | None = None
    digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "Split":
        """Some of the examples, selected by indices or by a boolean mask; images in memory are copied."""
        files, digests = (None if array is None else array[indices] for array in (self.files, self.digests))
        return Split(self.images[indices], self.labels[indices], files, digests)


@dataclass(frozen=True)
class Dataset:
    """A named dataset.

    Attributes:
        name: the resolved name, never ``auto``.
        train: the examples to train on.
        test: the examples to report results on.
        class_names: one for each label.
        validation: the examples to choose checkpoints and settings by, or None.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    validation: Split | None = None

    @classmethod
    def from_arrays(
        cls,
        train: Arrays,
        test: Arrays,
        validation: Arrays | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> Self:
        """A dataset from arrays in memory.

        Args:
            train: images, uint8 ``[N, H, W, C]`` or ``[N, H, W]``, and labels, integers ``[N]`` counted from 0. The
                images are not copied.
            test: likewise, with images of the same height, width and channels.
            validation: likewise, or None.
            class_names: one for each label; defaults to ``"0"``, ``"1"``, ... up to the largest label.
            name: what to call the dataset in messages and in the report.

        Raises:
            UsageError: an array has the wrong type or shape, is empty, or a label is out of range.
        """
        given = {"train": train, "validation": validation, "test": test}
        splits = {part: _split(part, arrays) for part, arrays in given.items() if arrays is not None}
        for part, split in splits.items():
            if split.images.shape[1:] != splits["train"].images.shape[1:]:
                raise UsageError(
                    f"{part} images must have the shape of the train images, "
                    f"{splits['train'].images.shape[1:]}, not {split.images.shape[1:]}"
                )
        if class_names is None:
            class_names = [str(label) for label in range(1 + max(int(split.labels.max()) for split in splits.values()))]
        for part, split in splits.items():
            if split.labels.max() >= len(class_names):
                raise UsageError(
                    f"{part} labels must be below {len(class_names)}, the number of classes, not {split.labels.max()}"
                )
        return cls(
            name, splits["train"], splits["test"], tuple(map(str, class_names)), validation=splits.get("validation")
        )

    @property
    def splits(self) -> dict[str, Split]:
        """``train``, ``validation`` if there is one, and ``test``, in this order."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {part: split for part, split in splits.items() if split is not None}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)`` of every image."""
        return self.train.images.shape[1:]

    @property
    def sha256(self) -> str:
        """The SHA-256 digest of all splits, in hexadecimal: of their images and labels in order, and the class names.

        Images that were decoded are represented by the digests of their encoded forms. Arrays are read on every access,
        because they can be modified in place. That takes one or two seconds per gigabyte of images, and no additional
        memory if they are contiguous.
        """
        digest = hashlib.sha256(repr((self.image_shape, self.class_names)).encode(errors="surrogatepass"))
        for part, split in self.splits.items():
            digest.update(f"{part} {len(split)}".encode())
            images = np.ascontiguousarray(split.images) if split.digests is None else b"".join(split.digests)
            digest.update(images)
            digest.update(np.ascontiguousarray(split.labels))
        return digest.hexdigest()


def _split(part: str, arrays: Arrays) -> Split:
    try:
        images, labels = map(np.asarray, arrays)
    except (TypeError, ValueError):
        raise UsageError(f"{part} must be a pair of arrays, images and labels") from None
    if images.dtype != np.uint8:
        raise UsageError(f"{part} images must be uint8, from 0 to 255, not {images.dtype}")
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4:
        raise UsageError(f"{part} images must have shape [N, H, W, C] or [N, H, W], not {list(images.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{part} labels must be integers, not {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise UsageError(
            f"{part} labels must have shape {list(images.shape[:1])}, one for each image, not {list(labels.shape)}"
        )
    if not images.size:
        raise UsageError(f"{part} images must not be empty, but have shape {list(images.shape)}")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise UsageError(f"{part} labels must be counted from 0, but range from {labels.min()} to {labels.max()}")
    return Split(images, labels.astype(np.int32))
