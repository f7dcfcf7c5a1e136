"""The package's own errors: one sentence that says what is wrong and what to do."""

import difflib
from collections.abc import Iterable


class CnnJaxError(Exception):
    """Something failed while running; the commands print it as one line and exit with status 1."""

    exit_status = 1


class UsageError(CnnJaxError):
    """What the user gave cannot be used; the commands print it as one line and exit with status 2."""

    exit_status = 2


def suggest(given: str, known: Iterable[str]) -> str:
    """A sentence's ending that names the known word nearest to a given one, or nothing where none is near."""
    nearest = difflib.get_close_matches(given.lower(), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
