"""The standard streams, which may be closed, full, or a pipe that nobody reads."""

import contextlib
import io
import logging
import os
import select
import sys
from collections.abc import Iterator

from cnn_jax.errors import printable

STDERR = 2
"""The file descriptor of standard error, even if ``sys.stderr`` is replaced."""


def say(message: object) -> None:
    """Print one line on standard error, or nothing if it cannot be written."""
    if not _accepts_writing(STDERR):  # nobody reads the pipe, and writing would wait forever
        return
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        discard(STDERR)


def open_standard_streams() -> None:
    """Open closed standard streams, and let them print any character."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would take its descriptor
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 (open until the process ends)
    sys.stderr = sys.stderr or open(STDERR, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the encoding may lack characters of a name


def log_to_stderr() -> None:
    """Print the package's log messages, of level INFO and above, on standard error."""
    logger = logging.getLogger("cnn_jax")
    logger.handlers = [_Say()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Say(logging.Handler):
    """Logs to standard error with ``say``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        say(self.format(record))


@contextlib.contextmanager
def discarding_output() -> Iterator[None]:
    """Discard what libraries print on standard output inside this context, also those in C++."""
    sys.stdout.flush()
    output = os.dup(1)
    discard(1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def write_to_stderr(line: bytes) -> None:
    """Write to standard error from a signal handler; do nothing if that would block or fail."""
    # The signal may have interrupted print, and the reader may have exited, as ``tee`` does on Ctrl-C.
    with contextlib.suppress(OSError):
        if _accepts_writing(STDERR):
            os.write(STDERR, line)


def discard(descriptor: int) -> None:
    """Redirect a file descriptor to the null device, including what is still buffered."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def reader_is_gone(descriptor: int) -> bool:
    """Whether nobody will read from this pipe any more."""
    return bool(_poll(descriptor) & (select.POLLERR | select.POLLHUP))


def _accepts_writing(descriptor: int) -> bool:
    """Whether writing a line returns at once, with or without an error."""
    return _poll(descriptor) != 0


def _poll(descriptor: int) -> int:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return next((event for _, event in poll.poll(0)), 0)
