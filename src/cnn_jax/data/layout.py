"""Where the images of a dataset are: ``CLASS/`` in a folder, or ``train/CLASS/`` and ``test/CLASS/``."""

import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cnn_jax.errors import UsageError

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
"""Names of the folder of each split."""

NOT_IMAGES = ("thumbs.db", "desktop.ini")
"""Names of the files that Windows adds to folders of images; those of Linux and macOS are hidden."""

logger = logging.getLogger("cnn_jax")


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, or the root as that of ``train`` if there are no splits.

    Raises:
        UsageError: the root cannot be read, or has some of the splits' folders only.
    """
    folders = _folders(root)
    found = {split: [root / name for name in names if root / name in folders] for split, names in SPLIT_FOLDERS.items()}
    if found["train"] and found["test"]:
        if len(found["validation"]) > 1:
            raise UsageError(f"{root} has {_few([f'{path.name}/' for path in found['validation']])}: keep one of them")
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


def class_names(root: Path, folders: Sequence[Path]) -> tuple[str, ...]:
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
    if len(names[0]) < 2:
        found = f"has only one class, {_few(names[0])}" if names[0] else "contains no folders of images"
        raise UsageError(
            f"{root} {found}: at least 2 classes are needed, each in a folder with its name, or in such folders in "
            "train/ and test/"
        )
    if unprintable := [name for name in names[0] if not name.isprintable()]:
        raise UsageError(f"{root}: {_few(unprintable)} is not a printable class name: rename the folder")
    return tuple(names[0])


def class_files(root: Path, class_folders: Iterable[Path]) -> list[list[Path]]:
    """The files of each class folder, sorted by name, with a warning if there are other folders inside.

    Raises:
        UsageError: a class folder cannot be read.
    """
    entries = [_visible(folder) for folder in class_folders]
    nested = [path for paths in entries for path in paths if os.path.isdir(path)]  # noqa: PTH112 (never raises)
    if nested:
        logger.warning(
            "ignored %d folder(s) inside the class folders of %s; the first is %s", len(nested), root, nested[0]
        )
    ignored = set(nested)
    return [[path for path in paths if path not in ignored] for paths in entries]


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
    return UsageError(
        f"cannot read the folder {folder}: {error.strerror}; check the path, and give that of a moved folder with "
        "--dataset folder:PATH"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
