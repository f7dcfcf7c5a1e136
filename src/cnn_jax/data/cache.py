"""A cache of decoded images on disk, so that a folder of image files is decoded only once."""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

import numpy as np

from cnn_jax import files

MAX_BYTES = 10 * 10**9
"""Maximum size of all entries in bytes: about 200,000 colour images of 128x128 pixels."""


class ImageCache:
    """Image arrays by name, written atomically to a directory; the least recently used are removed first.

    No method raises an error: entries that cannot be read or written are missing, and are decoded again. The directory
    is used only if no other user can write to it, since its content determines what a network is trained on.

    Args:
        directory: created, writable for this user only, if it does not exist.
        max_bytes: maximum size of all entries in bytes.
    """

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    def get(self, name: str, num_files: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The arrays stored under a name, or None if there are none or they are damaged.

        Args:
            name: the name passed to ``put``.
            num_files: the expected length of ``readable``.

        Returns:
            ``images``, uint8 ``[N, H, W, C]``, and ``readable``, bool ``[num_files]``.
        """
        try:
            if not files.private_directory(self._directory):
                return None
            with files.open_regular(self._path(name)) as file:
                images, readable, digest = (np.load(file, allow_pickle=False) for _ in range(3))
                os.utime(file.fileno())  # marks it as recently used
            intact = np.array_equal(digest, _digest(images, readable))
            expected = (readable.dtype, readable.shape, images.dtype, images.ndim) == (bool, (num_files,), np.uint8, 4)
            return (images, readable) if intact and expected and len(images) == readable.sum() else None
        except Exception:  # a damaged file can raise anything
            return None

    def put(self, name: str, images: np.ndarray, readable: np.ndarray) -> None:
        """Store arrays under a name, and remove the least recently used entries if the cache is full.

        Args:
            name: a valid file name.
            images: uint8 ``[N, H, W, C]``.
            readable: bool ``[num_files]``, for each file whether it is among the images.
        """
        if images.nbytes > self._max_bytes or not files.private_directory(self._directory):
            return
        with contextlib.suppress(OSError), files.temporary_directory(self._directory) as temporary:
            unfinished = temporary / self._path(name).name
            # Not numpy.savez: if the disk is full, zipfile prints an error that cannot be caught.
            with unfinished.open("wb") as file:
                for array in (images, readable, _digest(images, readable)):
                    np.save(file, array)
            files.sync(unfinished)
            unfinished.replace(self._path(name))
            files.sync(self._directory)
            self._remove_oldest()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.npy"

    def _remove_oldest(self) -> None:
        entries = [(path.lstat(), path) for path in self._directory.glob("*.npy")]
        entries = [
            (status.st_mtime_ns, status.st_size, path) for status, path in entries if stat.S_ISREG(status.st_mode)
        ]
        excess = sum(size for _, size, _ in entries) - self._max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _digest(images: np.ndarray, readable: np.ndarray) -> np.ndarray:
    sha256 = hashlib.sha256(images)
    sha256.update(readable)
    return np.frombuffer(sha256.digest(), np.uint8)
