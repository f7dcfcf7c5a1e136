"""What the commands have in common: flags in, one line for an error, an exit status out."""

import contextlib
import dataclasses
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from types import FrameType
from typing import Self, TypeVar

import tyro

from cnn_jax.errors import CnnJaxError, UsageError, suggest
from cnn_jax.files import user_cache

Flags = TypeVar("Flags")

STDERR = 2
"""Standard error's file descriptor, whatever ``sys.stderr`` is at the time."""

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


def run(main: Callable[[Sequence[str]], int]) -> int:
    """Call a command with the process's arguments.

    Returns:
        The exit status: the command's own, 1 for what failed, 2 for what the user gave.
    """
    notices = logging.getLogger("cnn_jax")
    notices.addHandler(logging.StreamHandler())
    notices.propagate = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may be in letters that the terminal has not
    use_every_processor()
    _keep_compiled_programs()
    try:
        with _handling(_stop_at_once):
            return _flushing(main, sys.argv[1:])
    except CnnJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        # Whoever read the output has enough of it: nothing more is written, not even when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:  # it is standard output that cannot be written to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: {error.strerror}: {error.filename or 'standard output'}", file=sys.stderr)
        return 1


def _flushing(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    # So that what cannot be written is known here, and not when Python ends.
    try:
        return main(args)
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While this context is entered, Ctrl-C and SIGTERM call a handler."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """End the process, with a line and the status of a shell.

    No exception is raised: jax's callbacks would swallow it, or be left in the middle of something.
    """
    # Not by print, for the signal may have come in the middle of one.
    os.write(STDERR, (SHOW_CURSOR if os.isatty(STDERR) else b"") + b"interrupted\n")
    os._exit(128 + number)


class StopSignals:
    """While this context is entered, Ctrl-C and SIGTERM ask to stop instead of stopping at once.

    Until the question is asked for the first time there is nothing to save, and they stop at once; so does the second.
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
            _stop_at_once(number, frame)  # what is saved is saved; nothing is to be waited for
        self._signal = number
        os.write(STDERR, b"stopping after this chunk; once more to stop at once\n")


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
    # By the environment, for jax is not imported yet; and whoever has set these otherwise has his way.
    cache = user_cache() / "compiled"
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if os.access(cache, os.W_OK):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _one_line(box: str) -> str:
    # tyro draws a box: a title, what is wrong, and below a rule what --help says too.
    lines = (line.strip("│╰╯ ") for line in box.splitlines()[1:])
    message = next(group for is_text, group in groupby(lines, lambda line: bool(line.strip("─-"))) if is_text)
    line = " ".join(message).removeprefix("Error parsing ")
    for theirs, ours in WORDINGS.items():
        line = re.sub(theirs, ours, line)
    return line.rstrip(".")
