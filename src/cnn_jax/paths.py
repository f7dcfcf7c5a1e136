"""Where this package keeps what it may keep for the user."""

import os
from pathlib import Path

from cnn_jax.errors import UsageError


def expanded(path: str) -> Path:
    """The path with ``~`` replaced by the home directory.

    Raises:
        UsageError: it is somebody's who is not known here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path} lies in nobody's home directory: name another path") from None


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/cnn_jax``, or ``~/.cache/cnn_jax`` where that is not set.

    See the XDG base directory specification, https://specifications.freedesktop.org/basedir-spec/.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn_jax"
