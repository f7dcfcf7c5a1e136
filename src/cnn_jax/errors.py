"""The package's own errors: one sentence that says what is wrong and what to do."""

import difflib
import logging
from collections.abc import Iterable


class CnnJaxError(Exception):
    """Something failed while running; the commands print it as one line and exit with status 1."""

    exit_status = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(CnnJaxError):
    """What the user gave cannot be used; the commands print it as one line and exit with status 2."""

    exit_status = 2


def suggest(given: str, known: Iterable[str]) -> str:
    """A sentence's ending that names the known word nearest to a given one, or nothing where none is near."""
    nearest = difflib.get_close_matches(given.lower(), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def printable(text: object) -> str:
    """Text as a terminal can be given it: names from files and paths may hold line breaks and control sequences.

    What cannot be printed (control characters, invisible and bidirectional marks, bytes that are not text) is written
    as in a Python string literal.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logging.getLogger("cnn_jax").addFilter(_make_printable)
