"""Where this package keeps what it may keep for the user."""

import os
from pathlib import Path


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/cnn_jax``, or ``~/.cache/cnn_jax`` where that is not set.

    See the XDG base directory specification, https://specifications.freedesktop.org/basedir-spec/.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn_jax"
