"""Files that a command writes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import expanded, replacing


@contextlib.contextmanager
def writing(name: str | None) -> Iterator[Path | None]:
    """Yield a temporary file that replaces the named one when the context is left without an error; None if it is None.

    Raises:
        UsageError: the file cannot be created.
    """
    if name is None:
        yield None
        return
    path = Path(os.path.realpath(expanded(name)))  # a symbolic link stays one
    with contextlib.ExitStack() as stack:
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is not a regular file: choose another file")
            temporary = stack.enter_context(replacing(path))
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error.strerror}): choose another file") from None
        yield temporary


@contextlib.contextmanager
def reporting(name: str) -> Iterator[None]:
    """Raise CnnJaxError if the named output file cannot be written in this context."""
    try:
        yield
    except OSError as error:
        raise CnnJaxError(f"cannot write {name} ({error.strerror}): free some space, or choose another file") from None
