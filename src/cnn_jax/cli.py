"""What the commands have in common: flags in, one line for an error, an exit status out."""

import contextlib
import dataclasses
import glob
import io
import logging
import os
import re
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

import tyro

from cnn_jax.errors import CnnJaxError, UsageError, printable, suggest
from cnn_jax.files import private_directory, remove_own_temporaries, user_cache

Flags = TypeVar("Flags")

STDERR = 2
"""The file descriptor of standard error, whatever ``sys.stderr`` is at the time."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the polite request to end, and the end of the terminal or connection."""

SHOW_CURSOR = b"\x1b[?25h"
"""ECMA-48's private mode 25, as every terminal since the VT220 knows it: the progress bar hides the cursor."""

WORDINGS = {
    r"invalid literal for int\(\) with base 10: (.*)": r"must be a whole number, not \1",
    r"could not convert string to float: (.*)": r"must be a number, not \1",
    r"no type matching \{None\}\|INT could be instantiated from \[(.*)\]": r"must be a whole number, not \1",
    r"no type matching \{None\}\|\{INT INT\} could be instantiated from \[(.*)\]": r"must be two whole numbers, not \1",
    r"no type matching \{None\}\|FLOAT could be instantiated from \[(.*)\]": r"must be a number, not \1",
    r"Missing from python -m [\w.]+: (\S+) (.*?) \(required\).*": r"\1 is missing: \2",
}
"""What Python and tyro say of a flag, and how this package does."""


def start(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command as the whole of this process."""
    _open_standard_streams()
    _ignore_errors_of_other_threads()
    use_every_processor()
    _keep_compiled_programs()
    status = run(main)
    if status == CnnJaxError.exit_status:
        _discard(STDERR)  # the error is told; the threads of a failed save print tracebacks until Python has ended
    sys.exit(status)


def run(main: Callable[[Sequence[str]], int]) -> int:
    """Call a command with the process's arguments.

    Returns:
        The exit status: the command's own, 1 if something failed, 2 if what the user gave cannot be used.
    """
    _log_to_stderr()
    try:
        with _handling(_stop_at_once):
            return _flushing(main, sys.argv[1:])
    except CnnJaxError as error:
        say(f"error: {error}")
        return error.exit_status
    except OSError as error:
        if error.filename is None:  # standard output cannot be written; nothing more is, not even when Python ends
            reader_is_gone = isinstance(error, BrokenPipeError) and _reader_is_gone(sys.stdout.fileno())
            _discard(sys.stdout.fileno())
            if reader_is_gone:  # as under ``| head``: it has all it wanted
                return 0
        say(f"error: {error.strerror}: {error.filename or 'standard output'}")
        return 1
    except (MemoryError, RuntimeError) as error:
        # As numpy and Python say it, and jax, whose error is not imported for a command that only prints its help.
        if not isinstance(error, MemoryError) and not re.search("Out of memory|RESOURCE_EXHAUSTED", str(error)):
            raise
        say("error: out of memory: use smaller images, a smaller --batch-size, or a machine with more memory")
        return 1


def say(message: object) -> None:
    """Print one line on standard error; it is lost if nobody can read it."""
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        _discard(STDERR)


def _open_standard_streams() -> None:
    """Give the process all three standard streams, and let them print any name."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take its place, and be written into
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 (they stay open as long as the process lives)
    sys.stderr = sys.stderr or open(STDERR, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal may lack the letters of a name


class _Say(logging.Handler):
    """Logs to standard error as ``say`` does."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        say(self.format(record))


def _log_to_stderr() -> None:
    logger = logging.getLogger("cnn_jax")
    logger.handlers = [_Say()]
    logger.propagate = False


def _ignore_errors_of_other_threads() -> None:
    """Keep what libraries print about a failed save out of the user's sight: the save raises one error for all of it.

    On a full disk Orbax logs it, and TensorStore's threads print tracebacks, also while the process ends.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: None
    show_unraisable = sys.unraisablehook

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        if threading.current_thread() is threading.main_thread():
            show_unraisable(unraisable)

    sys.unraisablehook = unraisablehook


def _flushing(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    # So that output that cannot be written is an error here, and not when Python ends.
    try:
        return main(args)
    finally:
        sys.stdout.flush()


def _discard(descriptor: int) -> None:
    """Have everything that is written to a descriptor from now on, or still in its buffer, go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _reader_is_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While this context is entered, the stop signals call a handler; one that is ignored stays ignored.

    A shell has Ctrl-C ignored in what it starts in the background, and ``nohup`` a hang-up.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: earlier for number, earlier in before.items() if earlier != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _write_to_stderr(line: bytes) -> None:
    # Not by print, which the signal may have interrupted; and whoever read it may be gone, as ``tee`` after Ctrl-C.
    with contextlib.suppress(OSError):
        os.write(STDERR, line)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """End the process, with a line and the exit status of a shell.

    No exception is raised: jax's callbacks would swallow it, or be left in the middle of something.
    """
    remove_own_temporaries()
    _write_to_stderr((SHOW_CURSOR if os.isatty(STDERR) else b"") + b"interrupted\n")
    os._exit(128 + number)


class StopSignals:
    """While this context is entered, a stop signal asks to stop instead of stopping at once.

    Until the question is asked for the first time there is nothing to save, and it stops at once; so does a second.
    """

    def __enter__(self) -> Self:
        self._signal: int | None = None
        self._asked = False
        self._handling = _handling(self._receive)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handling.__exit__(None, None, None)

    def received(self) -> bool:
        """Whether to stop."""
        self._asked = True
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """As a shell gives it for a process that the signal ended."""
        return 128 + self._signal

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None or not self._asked:
            _stop_at_once(number, frame)  # what is saved is saved; there is nothing to wait for
        self._signal = number
        _write_to_stderr(b"stopping after this chunk; once more to stop at once\n")


def parse(flags: type[Flags], args: Sequence[str], *, module: str, default: Flags | None = None) -> Flags:
    """Read the command line into a flat dataclass.

    Args:
        flags: the dataclass; ``--batch-size`` and ``--batch_size`` both set its ``batch_size``.
        args: the words of the command line.
        module: the command's, for the messages.
        default: an instance whose values hold where no flag is given.

    Raises:
        UsageError: an unknown flag (the nearest known one is suggested), or a value of the wrong type.
        SystemExit: help was asked for, and given.
    """
    program = f"python -m {module}"
    defaults = {} if default is None else {"default": default}
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            values, unknown = tyro.cli(flags, args=args, prog=program, return_unknown_args=True, **defaults)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(f"{_one_line(messages.getvalue())}; see {program} --help") from None
    if unknown:
        known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(flags)]
        raise UsageError(f"unknown argument {unknown[0]!r}{suggest(unknown[0], known)}; see {program} --help")
    return values


def use_every_processor() -> None:
    """Have jax take each processor for a device, unless the environment says otherwise; to call before jax looks."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):  # an older name of the same
        return
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(processors))


def _keep_compiled_programs() -> None:
    """Have jax keep compiled programs in the user's cache, unless the environment says otherwise.

    A compiled program is executed, so the cache must belong to the user and be closed to others.
    """
    try:
        cache = user_cache() / "compiled"
    except CnnJaxError:  # no home directory
        return
    if not private_directory(cache):
        return
    # By the environment, because jax is not imported yet; existing variables win.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if os.environ["JAX_COMPILATION_CACHE_DIR"] == str(cache):
        _repair_damaged_entries(cache)


def _repair_damaged_entries(cache: Path) -> None:
    """Remove a damaged entry of the compilation cache when jax warns of it, so that it is written anew.

    jax compiles the program in place of an entry that it cannot read, but never overwrites one.
    """
    show_warning = warnings.showwarning

    def showwarning(message: Warning | str, *details: Any, **options: Any) -> None:
        if match := re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message)):
            for entry in cache.glob(f"{glob.escape(match[1])}-*"):
                entry.unlink(missing_ok=True)
        else:
            show_warning(message, *details, **options)

    warnings.showwarning = showwarning


def _one_line(box: str) -> str:
    # tyro draws a box: a title, what is wrong, and below a rule what --help says too.
    lines = (line.strip("│╰╯ ") for line in box.splitlines()[1:])
    message = next(group for is_text, group in groupby(lines, lambda line: bool(line.strip("─-"))) if is_text)
    line = " ".join(message).removeprefix("Error parsing ")
    for theirs, ours in WORDINGS.items():
        line = re.sub(theirs, ours, line)
    return line.rstrip(".")
