"""A CSV file that says which class, and optionally which split, each image is of.

The first row names the columns; each of the others is an image::

    file,label,split
    images/1.png,cat,train
    images/2.png,dog,test

Whatever could be a mistake is an error that names the row, numbered as in a spreadsheet: the header is row 1.
"""

import csv
import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cnn_jax import files
from cnn_jax.data.splits import split_named
from cnn_jax.errors import UsageError

FILE_COLUMNS = ("file", "filename", "path", "image")
"""Names of the column of the files."""

CLASS_COLUMNS = ("label", "class")
"""Names of the column of the classes."""

SPLIT_COLUMNS = ("split",)
"""Names of the column of the splits, which may be missing."""

MAX_BYTES = 1 << 27
"""Maximum size of a CSV file in bytes, enough for more than a million images."""

MAX_CLASS_LENGTH = 255
"""Maximum length of the name of a class in characters, similar to that of a folder."""

MAX_SHOWN = 100
"""Maximum number of characters of a field in a message."""


class Row(NamedTuple):
    """An image.

    Attributes:
        file: its path relative to the folder of the CSV file, without ``.`` and repeated slashes.
        class_name: its class.
        split: ``"train"``, ``"validation"`` or ``"test"``; ``"train"`` if there is no column of the splits.
    """

    file: str
    class_name: str
    split: str


class Table(NamedTuple):
    """The content of a CSV file.

    Attributes:
        rows: one for each image, in the order of the CSV file; a file that is listed twice is there once.
        has_splits: whether there is a column of the splits.
    """

    rows: list[Row]
    has_splits: bool


class _Columns(NamedTuple):
    """The indices of the columns, and how many there are with the ignored ones."""

    file: int
    class_name: int
    split: int | None
    total: int


def read(path: Path) -> Table:
    """Read a CSV file, and check that the files in it exist.

    It is UTF-8, with or without a byte order mark, with commas between the fields, and double quotes around those that
    contain commas. Columns with other names and rows without content are ignored, as are spaces after a comma, and
    around the names of columns, classes and splits.

    Raises:
        UsageError: it cannot be read, is larger than ``MAX_BYTES``, or has a mistake.
    """
    rows = _numbered_rows(path, _text(path))
    columns = _columns(path, next(rows, (1, []))[1])
    found: dict[str, tuple[int, Row]] = {}
    for number, fields in rows:
        try:
            row = _row(path.parent, fields, columns)
            _check_same(*found.setdefault(row.file, (number, row)), row)
        except UsageError as error:
            raise UsageError(f"{path}, row {number}: {error}") from None
    if not found:
        raise UsageError(f"{path} has no rows below the names of the columns: add one for each image")
    return Table([row for _, row in found.values()], columns.split is not None)


def _text(path: Path) -> str:
    try:
        with files.open_data(path, MAX_BYTES) as file:
            return file.read(MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not encoded as UTF-8: save it as CSV in UTF-8") from None
    except OSError as error:
        raise UsageError(
            f"cannot read the file {path}: {error.strerror}; check the path, and give that of a moved file with "
            "--dataset folder:PATH"
        ) from None


def _numbered_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that have content, and their numbers."""
    number = 0
    try:
        for number, fields in enumerate(
            csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True), 1
        ):
            if any(fields):
                yield number, fields
    except csv.Error as error:
        raise UsageError(f"{path}, row {number + 1}: {error}; check the quotes in it") from None


def _columns(path: Path, header: Sequence[str]) -> _Columns:
    names = [name.strip().lower() for name in header]

    def index(accepted: Sequence[str]) -> int | None:
        found = [number for number, name in enumerate(names) if name in accepted]
        if len(found) > 1:
            listed = ", ".join(names[number] for number in found)
            raise UsageError(
                f"{path} has several columns with the same meaning, {listed}: rename or remove all but one"
            )
        return found[0] if found else None

    indices = [index(accepted) for accepted in (FILE_COLUMNS, CLASS_COLUMNS, SPLIT_COLUMNS)]
    for number, content, accepted in zip(indices, ("files", "classes"), (FILE_COLUMNS, CLASS_COLUMNS), strict=False):
        if number is None:
            separated = any(mark in name for mark in ";\t" for name in names)
            raise UsageError(
                f"{path} has no column of the {content}: name it {' or '.join(accepted)} in the first row"
                + (", and separate the columns with commas" if separated else "")
            )
    return _Columns(*indices, total=len(names))


def _row(folder: Path, fields: Sequence[str], columns: _Columns) -> Row:
    """A row, after checking it on its own."""
    if len(fields) != columns.total:
        raise UsageError(
            f"it has {len(fields)} fields, and the first row has {columns.total}: put double quotes around "
            "fields with commas"
        )
    class_name = fields[columns.class_name].strip()
    if not class_name:
        raise UsageError("the class is empty: add it, or remove the row")
    if not class_name.isprintable():
        raise UsageError(f"{_shown(class_name)} is not a printable class name: rename the class")
    if len(class_name) > MAX_CLASS_LENGTH:
        raise UsageError(
            f"the class name {_shown(class_name)} is longer than {MAX_CLASS_LENGTH} characters: shorten it"
        )
    split = "train"
    if columns.split is not None:
        name = fields[columns.split].strip()
        split = split_named(name)
        if split is None:
            raise UsageError(f"unknown split {_shown(name)}: use train, validation or test")
    return Row(_file(folder, fields[columns.file]), class_name, split)


def _file(folder: Path, name: str) -> str:
    """The normalized name of a file, after checking that it exists in the folder."""
    if not name.strip():
        raise UsageError("the file is empty: add it, or remove the row")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"{_shown(name)} is not below {folder}: use a path relative to it, without ..")
    problem = _problem(folder / path)
    if problem:
        hint = "use / instead of \\" if "\\" in name else "correct it, relative to the CSV file, or remove the row"
        raise UsageError(f"the file {_shown(name)} {problem}: {hint}")
    return str(path)


def _problem(path: Path) -> str:
    """Why a file cannot be an image, or an empty string. Whether it can be read is found out later."""
    try:
        return "is a folder" if stat.S_ISDIR(path.stat().st_mode) else ""
    except ValueError:  # Python has no OSError for this
        return "contains a null byte"
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        return "does not exist" if missing else f"cannot be read ({os.strerror(error.errno)})"


def _check_same(number: int, first: Row, row: Row) -> None:
    """Raise UsageError if a row of the same file as an earlier one, with this number, contradicts it."""
    for name, one, other in (("class", first.class_name, row.class_name), ("split", first.split, row.split)):
        if one != other:
            raise UsageError(
                f"{_shown(row.file)} has the {name} {_shown(other)} here and {_shown(one)} in row {number}: "
                "remove one of the rows"
            )


def _shown(field: str) -> str:
    return repr(field if len(field) <= MAX_SHOWN else f"{field[:MAX_SHOWN]}...")
