"""Atomic writes, safe reads, and temporary files.

A run directory or cache may come from somebody else, or be on a disk that fills up or loses power. Therefore new files
are written under a random temporary name, flushed to disk, and then renamed; and only regular files of a bounded size
are read from such directories, never symbolic links, pipes or devices.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cnn_jax.errors import UsageError

_TEMPORARY = re.compile(r"\.cnn_jax-[0-9a-f]{16}(-.*)?", re.DOTALL)
"""The names of this package's temporary files and directories."""

_in_use: set[Path] = set()
"""The temporary files and directories of this process."""


def expanded(path: str) -> Path:
    """Replace ``~`` in a path with the home directory.

    Raises:
        UsageError: the user or the home directory is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"the home directory in {path} is unknown: use a path without ~") from None


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/cnn_jax``, or ``~/.cache/cnn_jax`` if the variable is not set.

    See the XDG base directory specification, https://specifications.freedesktop.org/basedir-spec/.

    Raises:
        UsageError: the home directory is unknown.
    """
    try:
        return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cnn_jax"
    except UsageError:
        raise UsageError("the home directory is unknown: set HOME, or XDG_CACHE_HOME to a cache directory") from None


def private_directory(path: Path) -> bool:
    """Create a directory that only its owner can read or write, if it does not exist.

    Returns:
        Whether the path is a writable directory that this user owns and nobody else can write to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(path, os.W_OK | os.X_OK)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file, without following a symbolic link or blocking on a pipe.

    Args:
        path: the file.
        flags: flags for ``os.open``: ``os.O_RDONLY`` or ``os.O_RDWR``, optionally with others such as ``os.O_CREAT``.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "rb")


def open_data(path: Path, max_bytes: int) -> BinaryIO:
    """Open a regular file of a bounded size, without blocking on a pipe.

    Unlike ``open_regular``, this follows symbolic links, because users may have linked to their data.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is larger than ``max_bytes``.
        ValueError: the path contains a null byte.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of a bounded size.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than ``max_bytes``.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that atomically replaces ``path`` when the context is left without an error.

    After a crash or power loss, the path is either the old file or the complete new one.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    temporary = path.with_name(f"{_temporary_name()}-{path.name[-100:]}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    _in_use.add(temporary)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _in_use.discard(temporary)


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """Yield a new directory in ``parent``, which is removed with its content when the context is left.

    Temporary files of killed processes are removed too, unless another process is using ``parent``.

    Raises:
        OSError: the directory cannot be created.
    """
    with _working_in(parent) as alone:
        if alone:
            remove_temporaries(parent)
        path = parent / _temporary_name()
        path.mkdir(mode=0o700)
        _in_use.add(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            _in_use.discard(path)


@contextmanager
def _working_in(directory: Path) -> Iterator[bool]:
    """Hold a shared lock on a directory; yield whether no other process held one on entry."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:  # locked, or on a file system without locks
            alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | (0 if alone else fcntl.LOCK_NB))
        yield alone
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Remove the temporary files in a directory that no other process is using, except those of this process."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if is_temporary(path) and path not in _in_use and path.lstat().st_uid == os.geteuid():
                _remove(path)


def is_temporary(path: Path) -> bool:
    """Whether a path has the name of a temporary file or directory of this package."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _temporary_name() -> str:
    return f".cnn_jax-{secrets.token_hex(8)}"


def remove_own_temporaries() -> None:
    """Remove the temporary files and directories of this process, before it exits."""
    for path in list(_in_use):
        _remove(path)


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk.

    Raises:
        OSError: they could not be written.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by the file system
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
