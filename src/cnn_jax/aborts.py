"""One line instead of a stack trace when jax ends the process because others are missing.

The processes of a training watch each other through jax's coordination service. If one does not connect, ends, or stops
answering, the runtime writes a fatal error and a stack trace to the C library's ``stderr`` and calls ``abort``; jax
offers no way to handle this in Python. Before jax 0.9.2, the runtime writes three lines and exits with status 1.
"""

import contextlib
import ctypes
import os
import platform
import signal

import jax

from cnn_jax.errors import CnnJaxError

LOST_PROCESS = "another process of this training ended: see its messages, then restart all with --resume"

NOT_CONNECTED = (
    "not all processes were connected in time: start all within five minutes, with the same coordinator and number of "
    "processes"
)

ABORTS = jax.__version_info__ >= (0, 9, 2)
"""Whether the runtime calls ``abort``, rather than exiting on its own."""

STDERR = 2
"""The file descriptor of standard error."""

_handlers: list[object] = []
"""What C code refers to, so that it is not freed."""


def end_in_one_line() -> None:
    """Handle such aborts of this process by an error message and exit status 1; other aborts stay as they are.

    What C code writes to ``stderr``, but not what Python writes, is kept in a temporary file to tell them apart. This
    works with glibc, for which jaxlib is compiled on Linux; elsewhere, and before jax 0.9.2, it does nothing.
    """
    if platform.libc_ver()[0] != "glibc" or not ABORTS:
        return
    libc = ctypes.CDLL(None)
    libc.tmpfile.restype = libc.signal.restype = ctypes.c_void_p
    libc.setbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    libc.fileno.argtypes = [ctypes.c_void_p]
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    stream = libc.tmpfile()
    if stream is None:  # nowhere to write
        return
    libc.setbuf(stream, None)
    descriptor = libc.fileno(stream)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handle(number: int) -> None:
        written = os.pread(descriptor, 1 << 20, 0)
        if b"JAX distributed service detected fatal errors" in written:
            message = NOT_CONNECTED if b"RegisterTask" in written else LOST_PROCESS
            _write(f"error: {message}\n".encode())
            os._exit(CnnJaxError.exit_status)
        _write(written)
        libc.signal(number, None)  # the default action: abort raises the signal again

    _handlers.append(handle)
    ctypes.c_void_p.in_dll(libc, "stderr").value = stream
    libc.signal(signal.SIGABRT, ctypes.cast(handle, ctypes.c_void_p))


def _write(content: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(STDERR, content)
