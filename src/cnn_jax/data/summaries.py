"""What is kept on disk of images that are decoded whenever they are read: their shapes and sums."""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from cnn_jax import files
from cnn_jax.data.statistics import channel_sums

MAX_CHANNELS = 4

SUMMARY = np.dtype([("digest", "u1", 32), ("shape", "<u4", 3), ("sums", "<u8", (2, MAX_CHANNELS))])
"""The summary of an image: the SHA-256 digest of its encoded form, its shape ``(H, W, C)``, and the result of
``cnn_jax.data.statistics.channel_sums`` for its C channels."""


def summarize(digest: bytes, image: np.ndarray) -> np.void:
    """The ``SUMMARY`` of an image uint8 ``[H, W, C]`` that was decoded from a form with this digest."""
    summary = np.zeros((), SUMMARY)
    summary["digest"] = np.frombuffer(digest, np.uint8)
    summary["shape"] = image.shape
    summary["sums"][:, : image.shape[2]] = channel_sums(image)
    return summary[()]


class SummaryCache:
    """Summaries of images by the SHA-256 digest of their encoded form, in files of a directory.

    A file is an array of ``SUMMARY`` and the SHA-256 digest of it. Files are replaced whole; a damaged one is ignored.

    Args:
        directory: the directory, which only this user can write to; None to keep nothing.
        prefix: the beginning of the files' names, which depends on the settings that images are decoded with.
    """

    def __init__(self, directory: Path | None, prefix: str) -> None:
        self._directory = directory
        self._prefix = prefix
        self._summaries = np.empty(0, SUMMARY)
        for path in sorted(directory.glob(f"{prefix}-*.summaries")) if directory else ():
            with contextlib.suppress(OSError, ValueError):
                self._summaries = np.concatenate([self._summaries, _read(path)])
                os.utime(path, follow_symlinks=False)  # marks it as recently used
        self._rows = {digest.tobytes(): row for row, digest in enumerate(self._summaries["digest"])}

    def find(self, digest: bytes) -> np.void | None:
        """The summary of the image with a digest, or None."""
        row = self._rows.get(digest)
        return None if row is None else self._summaries[row]

    def store(self, summaries: np.ndarray) -> None:
        """Keep the summaries of a dataset's images for other processes, if they can be written."""
        digests = sorted(digest.tobytes() for digest in summaries["digest"])
        if self._directory is None or all(map(self._rows.__contains__, digests)):
            return
        content = summaries.tobytes()
        name = f"{self._prefix}-{hashlib.sha256(b''.join(digests)).hexdigest()}.summaries"
        with contextlib.suppress(OSError), files.replacing(self._directory / name) as path:
            path.write_bytes(content + hashlib.sha256(content).digest())


def _read(path: Path) -> np.ndarray:
    with files.open_regular(path) as file:
        content = file.read()
    body, digest = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("wrong digest")
    return np.frombuffer(body, SUMMARY)
