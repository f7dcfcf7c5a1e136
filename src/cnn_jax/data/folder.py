"""A dataset of image files, in a folder for each class or listed in a CSV file."""

import contextlib
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data import layout
from cnn_jax.data.cache import ImageCache
from cnn_jax.data.dataset import Dataset, Split
from cnn_jax.data.image import opened, quiet, read_image
from cnn_jax.data.splits import TEST_FRACTION, Part, content_hashes, held_out, own_validation
from cnn_jax.errors import UsageError
from cnn_jax.files import expanded, user_cache

SETTINGS = ("image_size", "channels", "skip_unreadable")
"""Fields of the config that apply to folders only. ``fit`` applies to prediction with any dataset too."""

CACHE_FORMAT = 3
"""Version of the cached images, to be increased when the same files are decoded differently."""

BATCH = 8
"""Number of files handed to a thread at a time: handing over a single one takes as long as reading a small one."""

Result = TypeVar("Result")

logger = logging.getLogger("cnn_jax")


def load(path: str, config: Config) -> Dataset:
    """Read the image files of a folder or of a CSV file, as listed by ``cnn_jax.data.layout.list_images``.

    One that ``read_image`` cannot read counts as an unreadable image. Every file is read once. It is decoded only if
    the cache, in the user's cache directory, has no image from a file with the same content.

    Without splits, a fifth of the images is held out for testing, and ``validation_fraction`` of the training images
    for validation. Which ones depends on the content of the files and ``split_seed``; see ``cnn_jax.data.splits``.

    The images for training, and those held out of them, are in the order of their files' SHA-256 digests, which mixes
    the classes. Those of ``val`` and ``test`` are in the order of the classes and file names. So the result is the same
    for the same images in folders, in a CSV file, and in one with its rows in another order.

    Args:
        path: the folder or CSV file.
        config: ``SETTINGS``, ``fit``, ``validation_fraction`` and ``split_seed`` are used.

    Returns:
        images uint8 ``[N, H, W, C]``, read-only, all splits in one array that is mapped from the cache, or in memory if
        that cannot be written; labels int32 ``[N]``, in the order of the sorted names of the classes. The name is
        ``folder:`` and the absolute path.

    Raises:
        UsageError: there are no images of several classes, or files that cannot be read.
    """
    listing = layout.list_images(_root(path))
    if config.validation_fraction and "validation" in listing.splits:
        raise own_validation(dataset_name(path))
    with _cache(config) as cache:
        files = _read(listing, config, cache, min_images=1 if len(listing.splits) > 1 else 2)
        selected = {split: np.flatnonzero(files.part == number) for number, split in enumerate(listing.splits)}
        # In the order of the classes, training with --no-shuffle would end with many steps on the last class only.
        selected["train"] = selected["train"][np.argsort(files.digests[selected["train"]], kind="stable")]

        def hold_out(split: Part, fraction: float) -> None:
            train = selected["train"]
            hashes = content_hashes(files.digests[train], config.split_seed, split)
            mask = held_out(files.labels[train], hashes, fraction, split, listing.class_names, exact=False)
            selected["train"], selected[split] = train[~mask], train[mask]

        if "test" not in selected:
            hold_out("test", TEST_FRACTION)
        if config.validation_fraction:
            hold_out("validation", config.validation_fraction)
        splits = _splits(listing, files, selected, cache)
    return Dataset(dataset_name(path), **splits, class_names=listing.class_names)


def load_unsplit(path: str, config: Config) -> Dataset:
    """Read images without splits and hold nothing out: all images are in the test split, and in ``train``.

    This is for evaluating a network that was not trained on them. See ``load``.
    """
    listing = layout.list_images(_root(path))
    with _cache(config) as cache:
        files = _read(listing, config, cache, min_images=1)
        split = _splits(listing, files, {"test": np.arange(len(files.labels))}, cache)["test"]
    return Dataset(dataset_name(path), split, split, listing.class_names)


def dataset_name(path: str) -> str:
    """The name of the dataset of a folder or CSV file."""
    return f"folder:{_root(path)}"


def has_splits(path: str) -> bool:
    """Whether the images of a folder or CSV file are split already. Raises ``UsageError`` if it cannot be read."""
    return layout.has_splits(_root(path))


def _root(path: str) -> Path:
    return expanded(path).absolute()


def _cache(config: Config) -> ImageCache:
    import PIL

    fit = config.image_size and config.fit  # it does not matter without a size
    settings = (CACHE_FORMAT, PIL.__version__, config.image_size, fit, config.channels)
    return ImageCache(user_cache() / "folders", settings)


class _Files(NamedTuple):
    """The readable files, and the shape ``(H, W, C)`` of the array of their images.

    Arrays ``[N]``: the label of each, int32; the index of its split; the SHA-256 digest of its content, bytes; and its
    path within the folder, str.
    """

    labels: np.ndarray
    part: np.ndarray
    digests: np.ndarray
    names: np.ndarray
    image_shape: tuple[int, int, int]


def _read(listing: layout.Listing, config: Config, cache: ImageCache, min_images: int) -> _Files:
    """Read all files; afterwards the cache has their images."""
    _check_counts(listing, listing.group, min_images)
    digests, image_shape = _decoded(listing, config, cache)
    readable = np.array([digest is not None for digest in digests])
    group = listing.group[readable]
    _check_counts(listing, group, min_images)
    part, labels = np.divmod(group, np.int32(len(listing.class_names)))
    # As objects: numpy would strip null bytes from the end of bytes.
    names = np.array([str(path.relative_to(listing.root)) for path in listing.paths], object)[readable]
    return _Files(labels, part, np.array(digests, object)[readable], names, image_shape)


def _splits(
    listing: layout.Listing, files: _Files, selected: Mapping[str, np.ndarray], cache: ImageCache
) -> dict[str, Split]:
    """The splits with the selected files, whose images are consecutive parts of one array."""
    order = np.concatenate(list(selected.values()))
    try:
        images = cache.gather(files.digests[order].tolist(), files.image_shape)
    except MemoryError:
        shape = "x".join(map(str, (len(order), *files.image_shape)))
        raise UsageError(
            f"not enough memory for the images of {listing.source}, {shape} bytes: use a smaller --image-size"
        ) from None
    parts = np.split(images, np.cumsum([len(indices) for indices in selected.values()])[:-1])
    return {
        split: Split(part, files.labels[indices], files.names[indices])
        for part, (split, indices) in zip(parts, selected.items(), strict=True)
    }


def _check_counts(listing: layout.Listing, group: np.ndarray, min_images: int) -> None:
    for name, count in zip(listing.groups, np.bincount(group, minlength=len(listing.groups)), strict=True):
        if count < min_images:
            raise UsageError(
                f"{name} has too few readable images, {count}: every class needs at least {min_images}"
                + (", one of them to be held out for testing" if min_images == 2 else "")
            )


def _decoded(
    listing: layout.Listing, config: Config, cache: ImageCache
) -> tuple[list[bytes | None], tuple[int, int, int]]:
    """Decode the files whose images are not in the cache, and add these to it.

    Returns:
        The SHA-256 digest of each file, or None if it is unreadable; and the shape ``(H, W, C)`` of the images,
        which are in color if any of them is.
    """

    def read(path: Path) -> tuple[bytes, tuple[int, int, int], bool]:
        with opened(path) as file:
            digest = hashlib.sha256(file.getvalue()).digest()
            image = cache.find(digest)
            missing = image is None
            if missing:
                image = read_image(file, config.image_size, config.channels, config.fit)
                cache.add(digest, image)
        return digest, image.shape, missing

    source, paths = listing.source, listing.paths
    digests = []
    first = None
    checked = 0  # the number of channels for which there is enough space
    fewest, most = 3, 0  # channels
    # Closed before the cache is: no thread may still be adding an image then.
    with contextlib.closing(_in_parallel(read, paths, config)) as results:
        for path, result in zip(paths, results, strict=True):
            digest, shape, missing = result or (None, None, False)
            digests.append(digest)
            if shape is None:
                continue
            first = first or (path, shape)
            if shape[:2] != first[1][:2]:
                raise _different_sizes(listing, first, (path, shape))
            fewest, most = min(fewest, shape[2]), max(most, shape[2])
            if missing and checked < most:
                num_left = len(paths) - max(len(digests), cache.num_added)
                _check_space(listing, (*shape[:2], most), num_left, fewest, cache)
                checked = most
    if first is None:
        raise UsageError(f"none of the {len(paths)} files of {source} can be read as an image")
    if skipped := [path for path, digest in zip(paths, digests, strict=True) if digest is None]:
        logger.warning(
            "skipped %d of the %d files of %s, which cannot be read as images; the first is %s",
            len(skipped),
            len(paths),
            source,
            skipped[0],
        )
    return digests, (*first[1][:2], most)


def _check_space(
    listing: layout.Listing, shape: tuple[int, int, int], num_left: int, fewest: int, cache: ImageCache
) -> None:
    """Raise UsageError if an array of all images with a shape fits neither on disk nor in memory.

    The files that are left to be decoded take space before that; they are assumed to have the fewest channels of those
    seen so far.
    """
    num_bytes = len(listing.paths) * math.prod(shape)
    if not cache.has_room(num_bytes, num_left * shape[0] * shape[1] * fewest):
        disk, memory = cache.free_space()
        raise UsageError(
            f"the {len(listing.paths)} images of {listing.source} need {num_bytes / 1e9:.2f} GB for "
            f"{'x'.join(map(str, shape))} each, and as much while they are decoded, but {disk / 1e9:.2f} GB of disk in "
            f"{user_cache()} and {memory / 1e9:.2f} GB of memory are free: use a smaller --image-size"
        )


def _different_sizes(listing: layout.Listing, *examples: tuple[Path, tuple[int, ...]]) -> UsageError:
    one, other = (f"{size[0]}x{size[1]} ({path.relative_to(listing.root)})" for path, size in examples)
    return UsageError(
        f"the images of {listing.source} differ in height and width, such as {one} and {other}: use --image-size to "
        "resize them, such as --image-size 64 64"
    )


def _in_parallel(
    function: Callable[[Path], Result], paths: Sequence[Path], config: Config
) -> Generator[Result | None, None, None]:
    """The results of a function for each file, in order; None for a file that is unreadable and to be skipped."""

    def attempt(path: Path) -> Result | None:
        try:
            return function(path)
        except UsageError as error:
            if config.skip_unreadable:
                return None
            raise UsageError(f"{error}; remove it or use --skip-unreadable") from None

    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    # More threads than processors would compete for the interpreter lock: with small files that takes longer.
    with quiet(), ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda batch: list(map(attempt, batch)), batches)
        try:
            yield from _with_bar(itertools.chain.from_iterable(results), len(paths))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or if the caller stops iterating


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
