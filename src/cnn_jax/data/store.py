"""Encoded images as arrays: decoded once and mapped from the disk, or decoded whenever they are read."""

import contextlib
import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from io import BytesIO
from typing import Protocol, Self, TypeVar

import numpy as np

from cnn_jax.data.cache import ImageCache
from cnn_jax.data.dataset import Split
from cnn_jax.data.image import quiet
from cnn_jax.data.streamed import Images, StreamedImages
from cnn_jax.data.summaries import SUMMARY, summarize
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import user_cache
from cnn_jax.processors import num_processors

BATCH = 8
"""Number of images handed to a thread at a time: handing over a single one takes as long as reading a small one."""

Result = TypeVar("Result")

logger = logging.getLogger("cnn_jax")


class Encoded(Protocol):
    """Encoded images, each with a number, counted from 0. Methods may be called from several threads.

    Attributes:
        described: what they belong to, in messages.
        settings: everything besides the encoded form of an image that determines the decoded one, see ``ImageCache``.
        skip_unreadable: whether to do without images that cannot be read.
        remedy: what to do about an image that cannot be read.
    """

    described: str
    settings: object
    skip_unreadable: bool
    remedy: str

    def __len__(self) -> int: ...

    def opened(self, number: int) -> AbstractContextManager[BytesIO]:
        """The encoded form of an image. Raises ``UsageError`` if it cannot be read."""

    def decode(self, file: BytesIO) -> np.ndarray:
        """Decode an image, uint8 ``[H, W, C]``. Raises ``UsageError`` if it cannot be decoded."""

    def name(self, number: int) -> str:
        """What an image is called in messages."""

    def different_shapes(self, *examples: tuple[int, tuple[int, ...]]) -> UsageError:
        """The error for two images, by number, of different shapes."""


class ChangedImageError(CnnJaxError):
    """An image that is decoded whenever it is read has changed or disappeared since it was first read."""


class _DoesNotFitError(Exception):
    """The decoded images do not fit where they are kept; the message says why."""


class ImageStore:
    """The decoded images of a dataset.

    Every image is decoded when the store is created, unless that was done before, so that one that cannot be decoded is
    found before training. Decoded images are kept on disk, or in memory if the cache's directory cannot be used. If
    they do not fit there, a line says so, and they are decoded again whenever they are read.

    To be used as a context manager, which releases what only the creation of arrays needs; the arrays remain valid.

    Args:
        encoded: the images.
        max_gigabytes: maximum size of the decoded images on disk; by default half of the disk's free space.

    Attributes:
        digests: bytes objects ``[N]``, the SHA-256 digest of each encoded image; None for one that cannot be read.
        image_shape: ``(H, W, C)``; images with one channel are repeated in C channels.

    Raises:
        UsageError: an image cannot be read, or differs in shape from another one.
    """

    def __init__(self, encoded: Encoded, max_gigabytes: float | None) -> None:
        max_bytes = None if max_gigabytes is None else int(max_gigabytes * 1e9)
        self._encoded = encoded
        self._is_limited = max_bytes is not None
        self._cache = ImageCache(user_cache() / "folders", encoded.settings, max_bytes)
        self._sums: np.ndarray | None = None  # of each image, once they are not kept
        self.digests = np.full(len(encoded), None, object)
        with contextlib.ExitStack() as on_error:
            on_error.push(self._cache)
            try:
                self.image_shape = self._keep()
            except _DoesNotFitError as reason:
                self.image_shape = self._stop_keeping(reason)
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._cache.__exit__(*error)

    @property
    def readable(self) -> np.ndarray:
        """Which images can be read, bool ``[N]``."""
        return np.array([digest is not None for digest in self.digests])

    def each(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """The images with these numbers one by one, uint8 ``[H, W, C]``."""
        if self._sums is not None:
            return iter(self.images(numbers))
        return (self._with_all_channels(self._cache.find(digest)) for digest in self.digests[numbers])

    def images(self, numbers: np.ndarray) -> Images:
        """The images with these numbers, uint8 ``[N, H, W, C]``, read-only."""
        if self._sums is None:
            try:
                return self._cache.gather(self.digests[numbers].tolist(), self.image_shape)
            except MemoryError:
                self._stop_keeping("they no longer fit on the disk or in memory")
        return StreamedImages(self._decode_again, self.image_shape, self._sums, numbers)

    def splits(
        self, selected: Mapping[str, np.ndarray], labels: np.ndarray, files: np.ndarray | None = None
    ) -> dict[str, Split]:
        """The splits with the selected images, which are consecutive parts of one array.

        Args:
            selected: the numbers of the images of each split.
            labels: int32 ``[N]``.
            files: the file of each image; see ``Split``.
        """
        images = self.images(np.concatenate(list(selected.values())))
        splits, start = {}, 0
        for split, numbers in selected.items():
            part = images[start : start + len(numbers)]
            named = None if files is None else files[numbers]
            splits[split] = Split(part, labels[numbers], named, self.digests[numbers])
            start += len(numbers)
        return splits

    def _keep(self) -> tuple[int, int, int]:
        """Decode the images that are not in the cache, and add these to it; return the shape of all."""

        def read(file: BytesIO, digest: bytes) -> tuple[tuple[int, ...], bool]:
            image = self._cache.find(digest)
            missing = image is None
            if missing:
                image = self._encoded.decode(file)
                self._cache.add(digest, image)
            return image.shape, missing

        common = _CommonShape(self._encoded)
        checked = 0  # the number of channels for which there is enough space
        # Closed before the cache is: no thread may still be adding an image then.
        with contextlib.closing(self._read_all(read)) as results:
            for number, (shape, missing) in results:
                common.include(number, shape)
                if missing and checked < common.channels:
                    num_left = len(self._encoded) - max(number + 1, self._cache.num_added)
                    self._check_limit(common)
                    self._check_space(common, num_left)
                    checked = common.channels
                elif self._is_limited:  # by the user, also for images that are in the cache
                    self._check_limit(common)
        return common.image_shape

    def _check_limit(self, common: "_CommonShape") -> None:
        """Raise ``_DoesNotFitError`` if an array of all images with this shape exceeds the limit of the cache."""
        limit, num_bytes = self._cache.max_bytes, len(self._encoded) * math.prod(common.image_shape)
        if limit is not None and num_bytes > limit:
            raise _DoesNotFitError(
                f"decoded they take {num_bytes / 1e9:.2f} GB, and the limit is {limit / 1e9:.2f} GB (--cache-limit)"
            )

    def _check_space(self, common: "_CommonShape", num_left: int) -> None:
        """Raise ``_DoesNotFitError`` if an array of all images with this shape fits neither on disk nor in memory.

        The images that are left to be decoded take space before that; they are assumed to have the fewest channels of
        those seen so far.
        """
        height, width, _ = common.image_shape
        num_bytes = len(self._encoded) * math.prod(common.image_shape)
        if not self._cache.has_room(num_bytes, num_left * height * width * common.fewest_channels):
            disk, memory = self._cache.free_space()
            raise _DoesNotFitError(
                f"decoded they take {num_bytes / 1e9:.2f} GB, and as much while they are decoded, but "
                f"{disk / 1e9:.2f} GB of disk in {user_cache()} and {memory / 1e9:.2f} GB of memory are free"
            )

    def _stop_keeping(self, reason: object) -> tuple[int, int, int]:
        """Keep no images from now on, but what is known of them; return the shape of all."""
        logger.info("decoding the images of %s whenever they are used: %s", self._encoded.described, reason)
        self._cache.discard_added()

        def read(file: BytesIO, digest: bytes) -> np.void:
            known = self._cache.summaries.find(digest)
            return summarize(digest, self._encoded.decode(file)) if known is None else known

        common = _CommonShape(self._encoded)
        summaries = np.zeros(len(self._encoded), SUMMARY)
        with contextlib.closing(self._read_all(read)) as results:
            for number, summary in results:
                common.include(number, tuple(summary["shape"].tolist()))
                summaries[number] = summary
        self._cache.summaries.store(summaries[summaries["shape"].any(axis=1)])
        repeated = summaries["shape"][:, 2] < common.channels
        summaries["sums"][repeated] = summaries["sums"][repeated, :, :1]
        self._sums = summaries["sums"][:, :, : common.channels]
        return common.image_shape

    def _decode_again(self, number: int) -> np.ndarray:
        problem = f"{self._encoded.name(number)} has changed"
        try:
            with self._encoded.opened(number) as file:
                if hashlib.sha256(file.getvalue()).digest() == self.digests[number]:
                    return self._with_all_channels(self._encoded.decode(file))
        except UsageError as error:
            problem = str(error)
        raise ChangedImageError(f"{problem}, and is decoded whenever it is used: restore it")

    def _with_all_channels(self, image: np.ndarray) -> np.ndarray:
        channels = self.image_shape[2]
        return image if image.shape[2] == channels else image.repeat(channels, axis=2)

    def _read_all(self, read: Callable[[BytesIO, bytes], Result]) -> Generator[tuple[int, Result], None, None]:
        """Read the images, in several threads, and yield the number and the result of each in order.

        Args:
            read: called with an encoded image and its digest.
        """

        def attempt(number: int) -> tuple[bytes, Result] | None:
            try:
                with self._encoded.opened(number) as file:
                    digest = hashlib.sha256(file.getvalue()).digest()
                    return digest, read(file, digest)
            except UsageError as error:
                if self._encoded.skip_unreadable:
                    return None
                raise UsageError(f"{error}; {self._encoded.remedy}") from None

        total = len(self._encoded)
        batches = [range(start, min(start + BATCH, total)) for start in range(0, total, BATCH)]
        skipped = []
        # More threads than processors would compete for the interpreter lock: with small files that takes longer.
        with quiet(), ThreadPoolExecutor(num_processors()) as pool:
            results = pool.map(lambda batch: list(map(attempt, batch)), batches)
            try:
                for number, result in enumerate(_with_bar(itertools.chain.from_iterable(results), total)):
                    if result is None:
                        skipped.append(number)
                        continue
                    self.digests[number] = result[0]
                    yield number, result[1]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, or if the caller stops iterating
        if len(skipped) == total:
            raise UsageError(f"none of the {total} files of {self._encoded.described} can be read as an image")
        if skipped:
            logger.warning(
                "skipped %d of the %d files of %s, which cannot be read as images; the first is %s",
                len(skipped),
                total,
                self._encoded.described,
                self._encoded.name(skipped[0]),
            )


class _CommonShape:
    """The shape that images have in common, except that some may have one channel and others three."""

    def __init__(self, encoded: Encoded) -> None:
        self._encoded = encoded
        self._first: tuple[int, tuple[int, int, int]] | None = None
        self.channels = self.fewest_channels = 0

    def include(self, number: int, shape: tuple[int, int, int]) -> None:
        """Take an image into account. Raises ``UsageError`` if its shape differs from those of others."""
        if self._first is None:
            self._first = number, shape
            self.channels = self.fewest_channels = shape[2]
        known = self._first[1]
        if shape[:2] != known[:2] or (shape[2] != known[2] and {shape[2], known[2]} != {1, 3}):
            raise self._encoded.different_shapes(self._first, (number, shape))
        self.channels = max(self.channels, shape[2])
        self.fewest_channels = min(self.fewest_channels, shape[2])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(H, W, C)`` with the most channels."""
        return (*self._first[1][:2], self.channels)


def _with_bar(results: Iterator[Result], total: int) -> Iterator[Result]:
    """The same results, with a progress bar if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from results
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        yield from bar.track(results, total=total, description="reading images")
