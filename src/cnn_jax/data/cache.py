"""A cache of decoded images on disk, so that an image file is decoded only once, and arrays of them can be mapped.

An entry is a file with an array of images. Entries are never modified: a new one is written under a temporary name with
ordinary writes, flushed and renamed, and only then mapped, read-only. So a full disk is an error that is handled, never
a signal, and an array remains valid when another process replaces or removes its entry.

The file of an entry is the concatenation of

- the images, uint8 ``[N, H, W, C]``;
- the index, uint8 ``[N, 65]``: the SHA-256 digest of each image file, that of the image in the array, and its number of
  channels, which is 1 if it is gray and repeated in C channels;
- the trailer: ``N, H, W, C`` as little-endian 64-bit integers, and the SHA-256 digest of the index and these.
"""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from cnn_jax import files
from cnn_jax.data.memory import available_memory
from cnn_jax.data.summaries import SummaryCache

SHAPE_BYTES = 4 * 8
DIGEST_BYTES = hashlib.sha256().digest_size
INDEX_BYTES = 2 * DIGEST_BYTES + 1

WRITE_BYTES = 1 << 20
"""Number of bytes written at a time."""


class ImageCache:
    """Decoded images by the SHA-256 digest of their file, from the entries of a directory and newly added ones.

    Every image is verified before its first use; one that is damaged counts as missing. The directory is used only if
    no other user can write to it, since its content determines what a network is trained on. Without it, or if it has
    no room, images are held in memory. Methods may be called from several threads. To be used as a context manager,
    which releases the added images on exit; arrays that ``gather`` has returned remain valid.

    Args:
        directory: created, accessible to this user only, if it does not exist.
        settings: everything besides a file's content that determines its decoded image. Its ``repr`` is compared.
        max_bytes: maximum size of all entries in bytes; by default half of the disk's free space, of which the entries
            count as part. The least recently used are removed when one is written.

    Attributes:
        summaries: the summaries of images with these settings that were not kept.
    """

    def __init__(self, directory: Path, settings: object, max_bytes: int | None = None) -> None:
        self._directory = directory
        self._prefix = hashlib.sha256(repr(settings).encode()).hexdigest()
        self._max_bytes = max_bytes
        self._usable = files.private_directory(directory)
        self._entries = dict(self._open_entries()) if self._usable else {}
        self.summaries = SummaryCache(directory if self._usable else None, self._prefix)
        self._added: dict[bytes, np.ndarray | _Stored] = {}
        self._temporary = None
        self._end = 0  # of the temporary file
        self._lock = threading.Lock()
        if self._usable:
            with contextlib.suppress(OSError):  # without a name, so that it never remains
                self._temporary = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (see __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._temporary:
            self._temporary.close()

    def find(self, digest: bytes) -> np.ndarray | None:
        """The image decoded from the file with a digest, uint8 ``[H, W, 1 or 3]``, or None.

        Raises:
            OSError: an added image cannot be read back from the disk.
        """
        stored = self._added.get(digest)
        if isinstance(stored, _Stored):
            pixels = os.pread(self._temporary.fileno(), math.prod(stored.shape), stored.offset)
            if hashlib.sha256(pixels).digest() != stored.digest:  # a network file system reports a full disk later
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self._directory))
            return np.frombuffer(pixels, np.uint8).reshape(stored.shape)
        if stored is not None:
            return stored
        images = (entry.find(digest) for entry in self._entries.values())
        return next((image for image in images if image is not None), None)

    def add(self, digest: bytes, image: np.ndarray) -> None:
        """Keep the image decoded from a file, uint8 ``[H, W, 1 or 3]``, for ``gather``: on disk, if there is room."""
        self._added[digest] = image
        with contextlib.suppress(OSError):
            if self._temporary:
                with self._lock:
                    offset, self._end = self._end, self._end + image.nbytes
                if os.pwrite(self._temporary.fileno(), image, offset) == image.nbytes:
                    self._added[digest] = _Stored(offset, image.shape, hashlib.sha256(image).digest())

    @property
    def num_added(self) -> int:
        """The number of images added so far."""
        return len(self._added)

    def discard_added(self) -> None:
        """Release the images added so far. No other thread may be adding one."""
        self._added.clear()
        self._end = 0
        with contextlib.suppress(OSError):
            if self._temporary:
                self._temporary.truncate(0)

    @property
    def max_bytes(self) -> int | None:
        """Maximum size of all entries in bytes; None if there are none, since the directory is not used."""
        if self._max_bytes is not None or not self._usable:
            return self._max_bytes
        return (self.free_space()[0] + sum(size for _, size, _ in _by_last_use(self._directory))) // 2

    def free_space(self) -> tuple[int, int]:
        """The free bytes on the disk, 0 if it is not used, and in memory."""
        return shutil.disk_usage(self._directory).free if self._usable else 0, available_memory()

    def has_room(self, array_bytes: int, added_bytes: int) -> bool:
        """Whether images that are still to be added, and then the array of all images, can be held.

        Added images are on disk as far as they fit there, and the others in memory. The array is in one of the two.
        The least recently used entries with other settings are removed if this makes room for all of it on disk.

        Args:
            array_bytes: the size of the array.
            added_bytes: the size of the images still to be added. If there are entries, which may have them, some or
                all may not need to be added: then only the array counts.
        """
        added = 0 if self._entries else added_bytes
        self._make_room(added + array_bytes)
        disk, memory = self.free_space()
        on_disk = min(added, disk)
        return array_bytes <= max(disk - on_disk, memory - (added - on_disk))

    def gather(self, digests: Sequence[bytes], image_shape: tuple[int, int, int]) -> np.ndarray:
        """An array of images that were found or added, as an entry of the cache.

        Args:
            digests: the digests of their files, at least one.
            image_shape: ``(H, W, C)``; images with one channel are repeated in C channels.

        Returns:
            uint8 ``[N, H, W, C]``, read-only: mapped from the entry, or in memory if it cannot be written.

        Raises:
            MemoryError: it can neither be written nor held in memory.
            OSError: an added image cannot be read back from the disk.
        """
        shape = (len(digests), *image_shape)
        name = f"{self._prefix}-{hashlib.sha256(b''.join(digests)).hexdigest()}.images"
        entry = self._entries.get(name)
        if entry and entry.holds(digests, shape):
            with contextlib.suppress(OSError):
                os.utime(self._directory / name, follow_symlinks=False)  # marks it as recently used
            return entry.images
        if self._usable:
            with contextlib.suppress(OSError):
                self._write(self._directory / name, digests, shape)
                return _Entry(self._directory / name).images
        if math.prod(shape) > available_memory():  # allocating it may succeed nevertheless, and kill the process later
            raise MemoryError
        images = np.empty(shape, np.uint8)
        for row, digest in zip(images, digests, strict=True):
            row[...] = self.find(digest)
        images.flags.writeable = False
        return images

    def _open_entries(self) -> Iterator[tuple[str, "_Entry"]]:
        """The entries with these settings, the most recently used first."""
        for _, _, path in reversed(_by_last_use(self._directory)):
            if path.name.startswith(self._prefix) and path.suffix == ".images":
                with contextlib.suppress(Exception):  # a damaged file can raise anything
                    yield path.name, _Entry(path)

    def _write(self, path: Path, digests: Sequence[bytes], shape: tuple[int, int, int, int]) -> None:
        with files.temporary_directory(self._directory) as temporary:
            unfinished = temporary / path.name
            with unfinished.open("wb", buffering=WRITE_BYTES) as file:
                index = bytearray()
                for digest in digests:
                    image = self.find(digest)
                    channels = image.shape[2]
                    if channels < shape[3]:
                        image = image.repeat(shape[3], axis=2)
                    pixels = np.ascontiguousarray(image)
                    file.write(pixels)
                    index += digest + hashlib.sha256(pixels).digest() + bytes([channels])
                file.write(index)
                encoded_shape = np.array(shape, "<u8").tobytes()
                file.write(encoded_shape + hashlib.sha256(index + encoded_shape).digest())
            files.sync(unfinished)
            unfinished.replace(path)
            files.sync(self._directory)
        self._remove_least_recently_used(path)

    def _make_room(self, num_bytes: int) -> None:
        disk, _ = self.free_space()
        others = [entry for entry in _by_last_use(self._directory) if not entry[2].name.startswith(self._prefix)]
        if disk < num_bytes <= disk + sum(size for _, size, _ in others):
            _remove_first(others, num_bytes - disk)

    def _remove_least_recently_used(self, kept: Path) -> None:
        used = _by_last_use(self._directory)
        excess = sum(size for _, size, _ in used) - self.max_bytes
        _remove_first([entry for entry in used if entry[2] != kept], excess)


class _Stored(NamedTuple):
    """The place of an added image in the temporary file, and the SHA-256 digest of its pixels."""

    offset: int
    shape: tuple[int, ...]
    digest: bytes


class _Entry:
    """An entry of the cache.

    Args:
        path: its file.

    Attributes:
        images: uint8 ``[N, H, W, C]``, a read-only view of the mapped file.

    Raises:
        OSError, ValueError: it cannot be read, is not a regular file, or is damaged in other places than the images.
    """

    def __init__(self, path: Path) -> None:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(size - SHAPE_BYTES - DIGEST_BYTES)
            encoded_shape, digest = file.read(SHAPE_BYTES), file.read(DIGEST_BYTES)
            shape = np.frombuffer(encoded_shape, "<u8").tolist()
            num_images, index_bytes = shape[0], shape[0] * INDEX_BYTES
            if math.prod(shape) + index_bytes + SHAPE_BYTES + DIGEST_BYTES != size:
                raise ValueError("wrong size")
            file.seek(math.prod(shape))
            index = file.read(index_bytes)
            if hashlib.sha256(index + encoded_shape).digest() != digest:
                raise ValueError("wrong digest")
            self.images = np.asarray(np.memmap(file, np.uint8, "r", shape=tuple(shape)))
        columns = np.frombuffer(index, np.uint8).reshape(num_images, INDEX_BYTES)
        self._file_digests = columns[:, :DIGEST_BYTES].tobytes()
        self._image_digests = columns[:, DIGEST_BYTES:-1]
        self._channels = columns[:, -1]
        starts = range(0, len(self._file_digests), DIGEST_BYTES)
        self._rows = {self._file_digests[start : start + DIGEST_BYTES]: row for row, start in enumerate(starts)}
        self._verified = np.zeros(num_images, bool)

    def find(self, digest: bytes) -> np.ndarray | None:
        """The image decoded from the file with a digest, or None if it is missing or damaged."""
        row = self._rows.get(digest)
        if row is None or not self._intact(row):
            return None
        return self.images[row, ..., : self._channels[row]]

    def holds(self, digests: Sequence[bytes], shape: tuple[int, ...]) -> bool:
        """Whether the array has this shape and exactly the images from the files with these digests, undamaged."""
        same = self.images.shape == shape and self._file_digests == b"".join(digests)
        return same and all(map(self._intact, range(len(digests))))

    def _intact(self, row: int) -> bool:
        if not self._verified[row]:
            digest = hashlib.sha256(self.images[row]).digest()
            self._verified[row] = digest == self._image_digests[row].tobytes()
        return bool(self._verified[row])


def _by_last_use(directory: Path) -> list[tuple[int, int, Path]]:
    """Time of last use, size and path of the files in a directory, the least recently used first."""
    used = []
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            with contextlib.suppress(OSError):  # another process has removed it
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    used.append((status.st_mtime_ns, status.st_size, path))
    return sorted(used)


def _remove_first(used: list[tuple[int, int, Path]], num_bytes: int) -> None:
    """Remove files of a result of ``_by_last_use`` until that many bytes are free."""
    for _, size, path in used:
        if num_bytes <= 0:
            return
        path.unlink(missing_ok=True)
        num_bytes -= size
