"""Running a command as a process: one-line errors and the exit status."""

import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from cnn_jax.cli.environment import keep_compiled_programs, use_every_processor
from cnn_jax.cli.signals import STOP_SIGNALS, handling, stop_at_once
from cnn_jax.cli.streams import STDERR, discard, log_to_stderr, open_standard_streams, reader_is_gone, say
from cnn_jax.errors import CnnJaxError


def start(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command and exit the process."""
    open_standard_streams()
    _ignore_errors_of_other_threads()
    use_every_processor()
    os.environ["MPLBACKEND"] = "agg"  # the commands draw to files only
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home directory that cannot be written
    keep_compiled_programs()
    try:
        status = run(main)
    except Exception:
        if not _is_distributed():
            raise
        traceback.print_exc()
        status = CnnJaxError.exit_status
    if status == CnnJaxError.exit_status:
        discard(STDERR)  # threads of a failed save print tracebacks until the process ends
        if _is_distributed():
            os._exit(status)  # at a normal exit, jax waits for the other processes, which wait for this one
    for number in STOP_SIGNALS:  # all is written, and jax's cleaning up can be interrupted
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(status))
    sys.exit(status)


def _is_distributed() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def run(main: Callable[[Sequence[str]], int]) -> int:
    """Call a command with the process's arguments.

    Returns:
        The exit status: the command's own, 1 for a failure, 2 for invalid input.
    """
    log_to_stderr()
    try:
        with handling(stop_at_once):
            return _flushing(main, sys.argv[1:])
    except CnnJaxError as error:
        say(f"error: {error}")
        return error.exit_status
    except OSError as error:
        if error.filename is None:  # standard output cannot be written, also not when Python exits
            reader_left = isinstance(error, BrokenPipeError) and reader_is_gone(sys.stdout.fileno())
            discard(sys.stdout.fileno())
            if reader_left:  # as in ``| head``, which has read all it needs
                return 0
        say(f"error: {error.strerror}: {error.filename or 'standard output'}")
        return 1
    except (MemoryError, RuntimeError) as error:
        # numpy and Python raise MemoryError; jax raises a RuntimeError of its own, which is not imported here because
        # importing jax is slow.
        if not isinstance(error, MemoryError) and not re.search("Out of memory|RESOURCE_EXHAUSTED", str(error)):
            raise
        say("error: out of memory: use smaller images, a smaller --batch-size, or a machine with more memory")
        return 1


def _flushing(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    # Output that cannot be written is an error here, not when Python exits.
    try:
        return main(args)
    finally:
        sys.stdout.flush()


def _ignore_errors_of_other_threads() -> None:
    """Silence what libraries print about a failed save, which raises an error anyway.

    On a full disk, Orbax logs errors and TensorStore's threads print tracebacks, even while the process exits.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: None
    show_unraisable = sys.unraisablehook

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        if threading.current_thread() is threading.main_thread():
            show_unraisable(unraisable)

    sys.unraisablehook = unraisablehook
