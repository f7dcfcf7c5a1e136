"""Which images a dataset has, and of which class and split each one is: from its folders, or from a CSV file."""

import contextlib
import itertools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnn_jax.data import table
from cnn_jax.data.splits import SPLIT_NAMES, split_named
from cnn_jax.errors import UsageError

TABLE = "labels.csv"
"""Name of the CSV file of a folder."""

NOT_IMAGES = ("thumbs.db", "desktop.ini", "__macosx")
"""Names, in lower case, of what Windows and macOS add to folders and archives of images, besides hidden files."""

MAX_CHAIN = 8
"""Maximum number of folders that contain nothing but one other folder, to be looked through for a message."""

logger = logging.getLogger("cnn_jax")


class Listing(NamedTuple):
    """The images of a dataset, before any of them is read.

    Attributes:
        source: the folder or the CSV file.
        root: the folder that the names of the images are relative to.
        class_names: the sorted names of the classes.
        splits: the names of the splits, ``("train",)`` if the images are not split yet.
        groups: what to call the images of each class in each split in messages: first all classes of the first split.
        paths: the files, in the order of the groups, and sorted in each of them.
        group: the index of each file's group, int32 ``[N]``.
    """

    source: Path
    root: Path
    class_names: tuple[str, ...]
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    paths: list[Path]
    group: np.ndarray


def list_images(path: Path) -> Listing:
    """List the images of a dataset.

    Args:
        path: a folder with the classes' folders, or with such folders in ``train/``, optionally ``val/``, and
            ``test/``; or a CSV file, see ``cnn_jax.data.table``; or a folder with the CSV file ``labels.csv``, which is
            ignored with a warning if there are classes' folders.

    Raises:
        UsageError: the path is none of these, or cannot be read.
    """
    csv = _table(path)
    if csv:
        return _listed_in_table(csv)
    listing = _listed_in_folders(path)
    if os.path.lexists(path / TABLE):
        logger.warning(
            "%s is ignored, because the folders next to it are the classes: use folder:%s to read it",
            path / TABLE,
            path / TABLE,
        )
    return listing


def has_splits(path: Path) -> bool:
    """Whether the images are split already, by folders or by a column of the CSV file. See ``list_images``.

    Raises:
        UsageError: the path cannot be read.
    """
    csv = _table(path)
    return table.read(csv).has_splits if csv else len(_split_folders(path)) > 1


def _table(path: Path) -> Path | None:
    """The CSV file with the classes, or None if they are folders."""
    if path.suffix.lower() == ".csv" and not os.path.isdir(path):  # noqa: PTH112 (never raises)
        return path
    csv = path / TABLE
    if not os.path.lexists(csv):
        return None
    # Folders of the splits are not classes, but what is in them may be.
    folders = [_folders(folder) if split_named(folder.name) else [folder] for folder in _folders(path)]
    return csv if sum(map(len, folders)) < 2 else None


def _listed_in_table(csv: Path) -> Listing:
    rows, split = table.read(csv)
    class_names = sorted({row.class_name for row in rows})
    if len(class_names) < 2:
        raise UsageError(f"{csv} has only one class, {class_names[0]}: at least 2 classes are needed")
    used = {row.split for row in rows}
    if missing := [name for name in ("train", "test") if split and name not in used]:
        raise UsageError(
            f"{csv} has no row with the split {missing[0]}: add some, or remove the column of the splits to hold out a "
            "fifth of the images for testing"
        )
    splits = [name for name in SPLIT_NAMES if name in used]
    paths: dict[tuple[str, str], list[Path]] = {group: [] for group in itertools.product(splits, class_names)}
    for row in rows:
        paths[row.split, row.class_name].append(csv.parent / row.file)
    groups = [f"class {name!r}{f' of the split {part}' if split else ''} in {csv}" for part, name in paths]
    return _listing(csv, csv.parent, class_names, splits, groups, list(paths.values()))


def _listed_in_folders(root: Path) -> Listing:
    splits = _split_folders(root)
    class_names = _class_names(root, list(splits.values()))
    folders = [folder / name for folder in splits.values() for name in class_names]
    paths = [_files_below(folder) for folder in folders]
    if not any(path.parent == folder for folder, below in zip(folders, paths, strict=True) for path in below):
        inner = [[folder.name for folder in _folders(folder)] for folder in folders]
        if len(inner[0]) > 1 and all(names == inner[0] for names in inner):
            logger.warning(
                "the classes of %s are %s, not the folders that are in each of them, %s",
                root,
                _few(class_names),
                _few(inner[0]),
            )
    return _listing(root, root, class_names, list(splits), list(map(str, folders)), paths)


def _listing(
    source: Path,
    root: Path,
    class_names: Sequence[str],
    splits: Sequence[str],
    groups: Sequence[str],
    paths: Sequence[list[Path]],
) -> Listing:
    """A listing, from the files of each group in any order."""
    group = np.repeat(np.arange(len(groups), dtype=np.int32), list(map(len, paths)))
    ordered = [path for files in paths for path in sorted(files, key=str)]
    return Listing(source, root, tuple(class_names), tuple(splits), tuple(groups), ordered, group)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, or the root as that of ``train`` if there are no splits.

    Raises:
        UsageError: the root cannot be read, has some of the splits' folders only, or has several of one split.
    """
    folders = _folders(root)
    found = {split: [folder for folder in folders if split_named(folder.name) == split] for split in SPLIT_NAMES}
    both = found["train"] and found["test"]
    for split, paths in found.items():
        if len(paths) > 1 and (both or split != "validation"):
            raise UsageError(f"{root} has {_few([f'{path.name}/' for path in paths])}: keep one of them")
    if both:
        return {split: paths[0] for split, paths in found.items() if paths}
    # A single one of them that contains images is the folder of a class with this name.
    for split, missing in (("train", "test"), ("test", "train")):
        if found[split] and _folders(found[split][0]):
            folder = found[split][0]
            if found["validation"]:
                validation = found["validation"][0].name
                raise UsageError(
                    f"{root} has {folder.name}/ and {validation}/ but no {missing}/: add it, or rename {validation}/ "
                    "to it"
                )
            raise UsageError(
                f"{root} has {folder.name}/ but no {missing}/: add it, or use folder:{folder} to hold out a fifth of "
                "its images for testing"
            )
    return {"train": root}


def _class_names(root: Path, folders: Sequence[Path]) -> list[str]:
    """The sorted names of the classes' folders, which must be the same in the folders of all splits.

    Raises:
        UsageError: they differ, are fewer than two, cannot be printed, or cannot be read.
    """
    names = [[folder.name for folder in _folders(folder)] for folder in folders]
    for one, other in itertools.permutations(range(len(folders)), 2):
        if extra := [name for name in names[one] if name not in names[other]]:
            raise UsageError(
                f"{folders[one]} and {folders[other]} must have the same classes, but only {folders[one].name}/ has "
                f"{_few(extra)}"
            )
    if not names[0]:
        raise _no_classes(root)
    if len(names[0]) == 1:
        raise _only_one_class(root, folders, names[0][0])
    if unprintable := [name for name in names[0] if not name.isprintable()]:
        raise UsageError(f"{root}: class names must be printable: rename {_few(unprintable)}")
    return names[0]


def _no_classes(root: Path) -> UsageError:
    tables = [entry.path for entry in _visible(root) if entry.name.lower().endswith(".csv")]
    return UsageError(
        f"{root} contains no folders of images: at least 2 classes are needed, each in a folder with its name, in such "
        f"folders in train/ and test/, or in a column of the file {TABLE}"
        + (f"; use folder:{tables[0]} if that is the file" if tables else "")
    )


def _only_one_class(root: Path, folders: Sequence[Path], name: str) -> UsageError:
    """The error for a single folder, which also says what to do if the classes are the folders in it."""
    message = f"{root} has only one class, {name}: at least 2 classes are needed"
    outer = folders[0] / name
    for _ in range(MAX_CHAIN):
        inner = _folders(outer)
        if len(inner) != 1:
            break
        outer = inner[0]
    if len(inner) < 2:
        return UsageError(f"{message}, each in a folder with its name, or in such folders in train/ and test/")
    classes = _few([folder.name for folder in inner])
    if len(folders) == 1:
        return UsageError(f"{message}; if they are the folders in it, {classes}, use folder:{outer}")
    return UsageError(f"{message}; if they are the folders in {outer}, {classes}, move these to {folders[0]}")


def _files_below(folder: Path) -> list[Path]:
    """The files in a folder and in the folders below it, without hidden ones.

    Links to folders are followed, but no folder is read twice, by its own path if possible; nor is any that contains
    this one, whose images may be of other classes.

    Raises:
        UsageError: one of the folders cannot be read.
    """
    read = set()
    with contextlib.suppress(OSError):
        read = {_identity(parent) for path in (folder, folder.resolve()) for parent in path.parents}
    files, folders, links = [], [folder], []
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(current)
        except OSError as error:
            raise _unreadable(current, error) from None
        if identity in read:
            continue
        read.add(identity)
        for entry in _visible(current):
            if not _is_folder(entry):
                files.append(Path(entry.path))
            else:
                (links if entry.is_symlink() else folders).append(Path(entry.path))
    return files


def _identity(path: Path) -> tuple[int, int]:
    """What tells a folder from all others, under any path."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted by name."""
    return [Path(entry.path) for entry in _visible(folder) if _is_folder(entry)]


def _visible(folder: Path) -> list[os.DirEntry]:
    """The entries of a folder that are not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise _unreadable(folder, error) from None
    return sorted((entry for entry in visible if entry.name.lower() not in NOT_IMAGES), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads nowhere is an unreadable file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _unreadable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot read the folder {folder}: {error.strerror}; check the path, and give that of a moved folder with "
        "--dataset folder:PATH"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
