"""A dataset of image files, in a folder for each class."""

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
from cnn_jax.data.image import opened, quiet, read_image
from cnn_jax.data.splits import TEST_FRACTION, Part, content_hashes, held_out, own_validation
from cnn_jax.errors import UsageError
from cnn_jax.files import expanded, user_cache

SETTINGS = ("image_size", "channels", "skip_unreadable")
"""Fields of the config that apply to folders only."""

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
"""Names of the folder of each split."""

NOT_IMAGES = ("thumbs.db", "desktop.ini")
"""Names of the files that Windows adds to folders of images; those of Linux and macOS are hidden."""

CACHE_FORMAT = 2
"""Version of the cached arrays, to be increased when the same files are decoded differently."""

PIECE = 1 << 16
"""Number of bytes hashed at a time."""

BATCH = 8
"""Number of files handed to a thread at a time: handing over a single one takes as long as reading a small one."""

Result = TypeVar("Result")

logger = logging.getLogger("cnn_jax")


def load(path: str, config: Config) -> Dataset:
    """Read ``train/CLASS/``, optionally ``val/CLASS/``, and ``test/CLASS/`` of a folder, or ``CLASS/`` without splits.

    The images are PNG, JPEG, WebP or BMP files directly in the classes' folders; any other file there, unless hidden,
    counts as an unreadable image. Files next to the classes' folders are ignored, as are folders next to those of the
    splits. Decoded images are cached in the user's cache directory: the first time each file is read twice, to be
    hashed and to be decoded, and later once, to be hashed.

    Without splits, a fifth of the images is held out for testing, and ``validation_fraction`` of the training images
    for validation. Which ones depends on the content of the files and ``split_seed``; see ``cnn_jax.data.splits``. The
    images are then in the order of their files' SHA-256 digests.

    Args:
        path: the folder.
        config: ``SETTINGS``, ``validation_fraction`` and ``split_seed`` are used.

    Returns:
        images uint8 ``[N, H, W, C]``; labels int32 ``[N]``, in the order of the sorted names of the folders. The name
        is ``folder:`` and the absolute path.

    Raises:
        UsageError: the folder does not have this structure, or contains files that cannot be read.
    """
    root = _root(path)
    folders = _split_folders(root)
    if config.validation_fraction and "validation" in folders:
        raise own_validation(dataset_name(path))
    class_names, images, labels, part, digests = _read(root, folders, config, min_images=1 if len(folders) > 1 else 2)
    if len(folders) > 1:
        selected = {split: np.flatnonzero(part == number) for number, split in enumerate(folders)}
    else:
        selected = {"train": np.argsort(digests, kind="stable")}

    def hold_out(split: Part, fraction: float) -> None:
        train = selected["train"]
        hashes = content_hashes(digests[train], config.split_seed, split)
        mask = held_out(labels[train], hashes, fraction, split, class_names, exact=False)
        selected["train"], selected[split] = train[~mask], train[mask]

    if "test" not in selected:
        hold_out("test", TEST_FRACTION)
    if config.validation_fraction:
        hold_out("validation", config.validation_fraction)
    splits = {split: Split(images[indices], labels[indices]) for split, indices in selected.items()}
    return Dataset(dataset_name(path), **splits, class_names=class_names)


def load_unsplit(path: str, config: Config) -> Dataset:
    """Read ``CLASS/`` of a folder without holding anything out: all images are in the test split, and in ``train``.

    This is for evaluating a network that was not trained on them. See ``load``.
    """
    root = _root(path)
    class_names, images, labels, _, _ = _read(root, {"train": root}, config, min_images=1)
    split = Split(images, labels)
    return Dataset(dataset_name(path), split, split, class_names)


def dataset_name(path: str) -> str:
    """The name of the dataset in a folder."""
    return f"folder:{_root(path)}"


def has_splits(path: str) -> bool:
    """Whether a folder has folders for its splits. Raises ``UsageError`` if it cannot be read."""
    return len(_split_folders(_root(path))) > 1


def _root(path: str) -> Path:
    return expanded(path).absolute()


def _read(
    root: Path, folders: Mapping[str, Path], config: Config, min_images: int
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All images of the splits' folders.

    Returns:
        The class names; and of each image its pixels, its label, the index of its split, and its file's digest.
    """
    class_names = _class_names(root, list(folders.values()))
    class_folders = [folder / name for folder in folders.values() for name in class_names]
    paths = [_visible(folder) for folder in class_folders]
    _check_counts(class_folders, map(len, paths), min_images)
    images, digests, readable = _images(root, list(itertools.chain.from_iterable(paths)), config)
    index = np.repeat(np.arange(len(class_folders)), list(map(len, paths)))[readable]
    _check_counts(class_folders, np.bincount(index, minlength=len(class_folders)), min_images)
    part, labels = np.divmod(index.astype(np.int32), len(class_names))
    return class_names, images, labels, part, digests


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, or the root as that of ``train`` if there are no splits."""
    folders = _folders(root)
    found = {split: [root / name for name in names if root / name in folders] for split, names in SPLIT_FOLDERS.items()}
    if found["train"] and found["test"]:
        if len(found["validation"]) > 1:
            raise UsageError(f"{root} has both val/ and validation/: keep one of them")
        return {split: paths[0] for split, paths in found.items() if paths}
    # A single one of them that contains images is the folder of a class with this name.
    for split, missing in (("train", "test"), ("test", "train")):
        if found[split] and _folders(found[split][0]):
            if found["validation"]:
                validation = found["validation"][0].name
                raise UsageError(
                    f"{root} has {split}/ and {validation}/ but no {missing}/: add it, or rename {validation}/ to it"
                )
            raise UsageError(
                f"{root} has {split}/ but no {missing}/: add it, or use folder:{root / split} to hold out a fifth of "
                "its images for testing"
            )
    return {"train": root}


def _class_names(root: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    names = [[folder.name for folder in _folders(folder)] for folder in folders]
    for one, other in itertools.permutations(range(len(folders)), 2):
        if extra := [name for name in names[one] if name not in names[other]]:
            raise UsageError(
                f"{folders[one]} and {folders[other]} must have the same classes, but only {folders[one].name}/ has "
                f"{_few(extra)}"
            )
    if len(names[0]) < 2:
        found = f"has only one class, {_few(names[0])}" if names[0] else "contains no folders of images"
        raise UsageError(
            f"{root} {found}: at least 2 classes are needed, each in a folder with its name, or in such folders in "
            "train/ and test/"
        )
    if unprintable := [name for name in names[0] if not name.isprintable()]:
        raise UsageError(f"{root}: {_few(unprintable)} is not a printable class name: rename the folder")
    return tuple(names[0])


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in _visible(folder) if path.is_dir()]
    except OSError as error:
        raise _unreadable(folder, error) from None


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted by name."""
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from None
    return sorted((path for path in paths if path.name.lower() not in NOT_IMAGES), key=lambda path: path.name)


def _unreadable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read the folder {folder}: {error.strerror}; use another folder:PATH")


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _check_counts(folders: Sequence[Path], counts: Iterable[int], min_images: int) -> None:
    for folder, count in zip(folders, counts, strict=True):
        if count < min_images:
            raise UsageError(
                f"{folder} has too few readable images, {count}: every class needs at least {min_images}"
                + (", one of them to be held out for testing" if min_images == 2 else "")
            )


def _images(root: Path, paths: Sequence[Path], config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The decoded images, from the cache if the same files were decoded before.

    Returns:
        The readable images, uint8 ``[N, H, W, C]``; the SHA-256 digest of the file of each, bytes ``[N]``; and which
        files are readable, bool ``[number of files]``.
    """
    cache = ImageCache(user_cache() / "folders")
    digests = list(_in_parallel(_digest, paths, config, "reading images"))
    fingerprint = _fingerprint(root, paths, digests, config)
    if cached := cache.get(fingerprint, len(paths)):
        images, readable = cached
    else:
        images, readable, decoded_digests = _decoded(root, paths, config)
        if decoded_digests == digests:  # otherwise a file has changed since it was hashed
            cache.put(fingerprint, images, readable)
        digests = decoded_digests
    if skipped := [path for path, kept in zip(paths, readable, strict=True) if not kept]:
        logger.warning(
            "skipped %d of the %d files of %s, which cannot be read as images; the first is %s",
            len(skipped),
            len(paths),
            root,
            skipped[0],
        )
    # As objects: numpy would strip null bytes from the end of bytes.
    return images, np.array(digests, object)[readable], readable


def _digest(path: Path) -> bytes:
    """The SHA-256 digest of a file."""
    # hashlib.file_digest allocates a buffer, which takes longer than hashing a small file.
    sha256 = hashlib.sha256()
    with opened(path) as file:
        remaining = os.fstat(file.fileno()).st_size  # a file in /proc can be endless
        while piece := file.read(min(PIECE, remaining)):
            sha256.update(piece)
            remaining -= len(piece)
    return sha256.digest()


def _fingerprint(root: Path, paths: Sequence[Path], digests: Sequence[bytes | None], config: Config) -> str:
    """A digest of everything that determines the arrays."""
    import PIL

    settings = (CACHE_FORMAT, PIL.__version__, config.image_size, config.channels, config.skip_unreadable)
    sha256 = hashlib.sha256(repr(settings).encode())
    for path, digest in zip(paths, digests, strict=True):
        sha256.update(os.fsencode(path.relative_to(root)) + b"\0" + (digest or bytes(sha256.digest_size)))
    return sha256.hexdigest()


def _decoded(root: Path, paths: Sequence[Path], config: Config) -> tuple[np.ndarray, np.ndarray, list[bytes | None]]:
    """The readable images, which files they are, and the digest of the bytes that were decoded of each file."""
    digests: dict[Path, bytes] = {}

    def read(path: Path) -> np.ndarray:
        def on_read(content: bytes) -> None:
            digests[path] = hashlib.sha256(content).digest()

        return read_image(path, config.image_size, config.channels, on_read)

    images = None
    readable = np.zeros(len(paths), bool)
    num_images = 0
    for index, image in enumerate(_in_parallel(read, paths, config, "decoding images")):
        if image is None:
            continue
        if images is None:
            images = _allocated(root, (len(paths), *image.shape))
        elif image.shape[:2] != images.shape[1:3]:
            raise _different_sizes(root, (paths[np.argmax(readable)], images.shape[1:3]), (paths[index], image.shape))
        elif image.shape[2] > images.shape[3]:  # the first in colour
            grey, images = images[:num_images], _allocated(root, (*images.shape[:3], image.shape[2]))
            images[:num_images] = grey
        images[num_images] = image  # grey is repeated for each channel
        readable[index] = True
        num_images += 1
    if images is None:
        raise UsageError(f"none of the {len(paths)} files of {root} can be read as an image")
    return images[:num_images], readable, [digests.get(path) for path in paths]


def _allocated(root: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        raise UsageError(
            f"not enough memory for the images of {root}, {'x'.join(map(str, shape))} bytes: use a smaller --image-size"
        ) from None


def _different_sizes(root: Path, *examples: tuple[Path, tuple[int, ...]]) -> UsageError:
    one, other = (f"{size[0]}x{size[1]} ({path.relative_to(root)})" for path, size in examples)
    return UsageError(
        f"the images of {root} differ in height and width, such as {one} and {other}: use --image-size to resize "
        "them, such as --image-size 64 64"
    )


def _in_parallel(
    function: Callable[[Path], Result], paths: Sequence[Path], config: Config, description: str
) -> Iterator[Result | None]:
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
            yield from _with_bar(itertools.chain.from_iterable(results), len(paths), description)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, or if the caller stops iterating


def _with_bar(results: Iterator[Result], total: int, description: str) -> Iterator[Result]:
    """The same results, with a progress bar if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from results
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        yield from bar.track(results, total=total, description=description)
