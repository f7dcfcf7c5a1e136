"""A data set of one's own: a folder of image files for each class."""

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data.cache import ImageCache
from cnn_jax.data.dataset import Dataset, Split
from cnn_jax.data.image import image_size, is_colour, opened, quiet, read_image
from cnn_jax.data.splits import hold_out_of_each_class
from cnn_jax.errors import UsageError
from cnn_jax.files import expanded, user_cache

SETTINGS = ("image_size", "channels", "skip_unreadable")
"""Of a config, those that have a meaning here alone."""

PARTS = ("train", "test")
NO_IMAGES = ("thumbs.db", "desktop.ini")
"""What Windows leaves in folders of images; Linux and macOS hide theirs."""

FORMAT = 1
"""Of the cache; another number for whatever makes other arrays of the same files."""

PIECE = 1 << 16
"""Bytes of a file that are hashed at once."""

BATCH = 8
"""Files that a thread is handed at once: with one, handing it over would take as long as to read a small one."""

Result = TypeVar("Result")

logger = logging.getLogger("cnn_jax")


def load(path: str, config: Config) -> Dataset:
    """Read ``train/<class>/`` and ``test/<class>/`` of a folder, or ``<class>/`` and hold a fifth of each out to test.

    The images lie in the classes' folders themselves, as PNG, JPEG, WebP or BMP; anything else there but hidden files
    counts as an image that cannot be read. Files beside the classes' folders are of no account, and neither are
    folders beside ``train`` and ``test``. What has been decoded is kept in the user's cache directory.

    Args:
        path: the folder.
        config: whose ``image_size``, ``channels``, ``skip_unreadable`` and ``seed`` count here.

    Returns:
        images uint8 ``[N, H, W, C]``; labels int32 ``[N]``, by the sorted names of the folders. The name is
        ``folder:`` and the absolute path.

    Raises:
        UsageError: the folder is not of this form, or holds files that cannot be read.
    """
    root = expanded(path).absolute()
    parts = _parts(root)
    class_names = _class_names(root, parts)
    folders = [part / name for part in parts for name in class_names]
    files = [_visible(folder) for folder in folders]
    least = 1 if len(parts) == 2 else 2
    _check_counts(folders, map(len, files), least)
    images, readable = _images(root, list(itertools.chain.from_iterable(files)), config)
    places = np.repeat(np.arange(len(folders)), list(map(len, files)))[readable]
    counts = np.bincount(places, minlength=len(folders))
    _check_counts(folders, counts, least)
    labels = (places % len(class_names)).astype(np.int32)
    if len(parts) == 2:
        stop = counts[: len(class_names)].sum()
        train, test = Split(images[:stop], labels[:stop]), Split(images[stop:], labels[stop:])
    else:
        train, test = hold_out_of_each_class(images, labels, config.seed)
    return Dataset(f"folder:{root}", train, test, class_names)


def _parts(root: Path) -> list[Path]:
    """The folders that hold the classes' folders: those of the training and of the test split, or the one for both."""
    folders = _folders(root)
    there = [root / name for name in PARTS if root / name in folders]
    if len(there) == 1 and _folders(there[0]):  # with images in it, it is a class that is called so
        (missing,) = set(PARTS) - {there[0].name}
        raise UsageError(
            f"{root} has {there[0].name}/ and no {missing}/: add it, or give folder:{there[0]} to have "
            "a fifth held out to test"
        )
    return there if len(there) == 2 else [root]


def _class_names(root: Path, parts: Sequence[Path]) -> tuple[str, ...]:
    names = [[folder.name for folder in _folders(part)] for part in parts]
    for one, other in itertools.permutations(range(len(parts)), 2):
        if lacking := [name for name in names[one] if name not in names[other]]:
            raise UsageError(
                f"the classes in {parts[one]} and {parts[other]} must be the same: {_few(lacking)} "
                f"{'is' if len(lacking) == 1 else 'are'} in {parts[one].name}/ alone"
            )
    if len(names[0]) < 2:
        found = f"holds one class alone, {_few(names[0])}" if names[0] else "holds no folders of images"
        raise UsageError(
            f"{root} {found}: two or more are needed, each in a folder of its name, or in such folders in "
            "train/ and in test/"
        )
    if unprintable := [name for name in names[0] if not name.isprintable()]:
        raise UsageError(f"{root}: {_few(unprintable)} cannot be printed as a class's name: rename the folder")
    return tuple(names[0])


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in _visible(folder) if path.is_dir()]
    except OSError as error:
        raise _unreadable(folder, error) from None


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, by name."""
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from None
    return sorted((path for path in paths if path.name.lower() not in NO_IMAGES), key=lambda path: path.name)


def _unreadable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read the folder {folder}: {error.strerror}; give another as folder:PATH")


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _check_counts(folders: Sequence[Path], counts: Iterable[int], least: int) -> None:
    for folder, count in zip(folders, counts, strict=True):
        if count < least:
            raise UsageError(
                f"{folder} holds too few images that can be read, {count}: every class needs at least {least}"
                + (", one of them to be held out to test" if least == 2 else "")
            )


def _images(root: Path, paths: Sequence[Path], config: Config) -> tuple[np.ndarray, np.ndarray]:
    """The images in files, from the cache where the same have been decoded before.

    Returns:
        images uint8 ``[N, H, W, C]``; and for each file whether it is among them.
    """
    cache = ImageCache(user_cache() / "folders")
    sums = _sums(paths, config)
    fingerprint = _fingerprint(root, paths, sums, config)
    found = cache.get(fingerprint, len(paths))
    if found is None:
        *found, decoded_sums = _decoded(root, paths, config)
        if decoded_sums == sums:  # or a file was changed meanwhile, and the fingerprint is not of what was decoded
            cache.put(fingerprint, *found)
    images, readable = found
    if left_out := [path for path, kept in zip(paths, readable, strict=True) if not kept]:
        logger.warning(
            "left out %d of the %d files of %s, which cannot be read as images, the first of them %s",
            len(left_out),
            len(paths),
            root,
            left_out[0],
        )
    return images, readable


def _sums(paths: Sequence[Path], config: Config) -> dict[Path, bytes]:
    """The SHA-256 digest of each file; of one that cannot be read, that of an empty file."""
    sums = {}

    def add(path: Path) -> None:
        # As hashlib.file_digest does, whose buffer takes longer to make than a small file to hash.
        sha256 = hashlib.sha256()
        sums[path] = sha256.digest()
        with opened(path) as file:
            left = os.fstat(file.fileno()).st_size  # a file in /proc may have no end
            while piece := file.read(min(PIECE, left)):
                sha256.update(piece)
                left -= len(piece)
        sums[path] = sha256.digest()

    for _ in _in_parallel(add, paths, config, "reading images"):
        pass
    return sums


def _fingerprint(root: Path, paths: Sequence[Path], sums: Mapping[Path, bytes], config: Config) -> str:
    """A name for all that determines the arrays."""
    import PIL

    settings = (FORMAT, PIL.__version__, config.image_size, config.channels, config.skip_unreadable)
    sha256 = hashlib.sha256(repr(settings).encode())
    for path in paths:
        sha256.update(os.fsencode(path.relative_to(root)) + b"\0" + sums[path])
    return sha256.hexdigest()


def _decoded(root: Path, paths: Sequence[Path], config: Config) -> tuple[np.ndarray, np.ndarray, dict[Path, bytes]]:
    """As ``_images`` returns, and the SHA-256 digest of the bytes that were decoded of each file."""
    size = config.image_size or _common_size(root, paths, config)
    channels = config.channels or (3 if any(_in_parallel(is_colour, paths, config, "looking for colours")) else 1)
    shape = (len(paths), *size, channels)
    try:
        images = np.empty(shape, np.uint8)
    except MemoryError:
        raise UsageError(
            f"the images of {root} are {'x'.join(map(str, shape))} bytes, for which there is no memory: give a "
            "smaller --image-size"
        ) from None
    readable = np.zeros(len(paths), bool)
    kept = 0
    sums = {}

    def read(path: Path) -> np.ndarray:
        sha256 = hashlib.sha256()
        try:
            return read_image(path, size, channels, on_read=sha256.update)
        finally:
            sums[path] = sha256.digest()

    for index, image in enumerate(_in_parallel(read, paths, config, "decoding images")):
        if image is not None:
            images[kept] = image
            readable[index] = True
            kept += 1
    return images[:kept], readable, sums


def _common_size(root: Path, paths: Sequence[Path], config: Config) -> tuple[int, int]:
    examples = {}
    for path, size in zip(paths, _in_parallel(image_size, paths, config, "measuring images"), strict=True):
        if size is not None:
            examples.setdefault(size, path)
    if not examples:
        raise UsageError(f"none of the {len(paths)} files of {root} can be read as an image")
    if len(examples) > 1:
        one, other = (
            f"{height}x{width} ({path.relative_to(root)})"
            for (height, width), path in itertools.islice(examples.items(), 2)
        )
        raise UsageError(
            f"the images of {root} differ in height and width, such as {one} and {other}: give what to bring "
            "them to, such as --image-size 64 64"
        )
    return next(iter(examples))


def _in_parallel(
    function: Callable[[Path], Result], paths: Sequence[Path], config: Config, description: str
) -> Iterator[Result | None]:
    """What a function makes of each file, in their order: nothing of one that cannot be read and is to be left out."""

    def attempt(path: Path) -> Result | None:
        try:
            return function(path)
        except UsageError as error:
            if config.skip_unreadable:
                return None
            raise UsageError(f"{error}; remove it or use --skip-unreadable") from None

    batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
    with quiet(), ThreadPoolExecutor() as pool:
        results = pool.map(lambda batch: list(map(attempt, batch)), batches)
        try:
            yield from _with_bar(itertools.chain.from_iterable(results), len(paths), description)
        finally:
            pool.shutdown(cancel_futures=True)  # where somebody has seen enough, or something went wrong


def _with_bar(results: Iterator[Result], total: int, description: str) -> Iterator[Result]:
    """The same results, and how many of them there are on a bar, where standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from results
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        yield from bar.track(results, total=total, description=description)
