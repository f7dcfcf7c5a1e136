"""The package's errors; each message says what is wrong, then what to do."""

import difflib
import logging
from collections.abc import Iterable


class CnnJaxError(Exception):
    """A failure at run time; the commands print it as one line and exit with status 1."""

    exit_status = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class UsageError(CnnJaxError):
    """Invalid input from the user; the commands print it as one line and exit with status 2."""

    exit_status = 2


def suggest(given: str, known: Iterable[str]) -> str:
    """Suggest the known word most similar to a given one.

    Args:
        given: the unknown word.
        known: the known words.

    Returns:
        The end of an error message, or an empty string if no known word is similar.
    """
    nearest = difflib.get_close_matches(given.lower(), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def printable(text: object) -> str:
    """Escape text for printing, because file names may contain line breaks and control sequences.

    Unprintable characters (control characters, invisible and bidirectional marks, bytes that cannot be decoded) are
    escaped as in a Python string literal.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def _make_printable(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), ()
    return True


logging.getLogger("cnn_jax").addFilter(_make_printable)
