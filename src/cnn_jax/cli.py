"""What the commands have in common: flags in, one line for an error, an exit status out."""

import argparse
import contextlib
import dataclasses
import glob
import inspect
import io
import logging
import os
import re
import select
import signal
import sys
import textwrap
import threading
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, Self, TypeVar

from cnn_jax.errors import CnnJaxError, UsageError, printable, suggest
from cnn_jax.files import private_directory, remove_own_temporaries, user_cache
from cnn_jax.settings import InvalidSettingError, type_and_meta

Flags = TypeVar("Flags")

STDERR = 2
"""The file descriptor of standard error, whatever ``sys.stderr`` is at the time."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the polite request to end, and the end of the terminal or connection."""

SHOW_CURSOR = b"\x1b[?25h"
"""ECMA-48's private mode 25, as every terminal since the VT220 knows it: the progress bar hides the cursor."""


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


def parse(
    flags: type[Flags], args: Sequence[str], *, module: str, defaults: Mapping[str, Any] = MappingProxyType({})
) -> Flags:
    """Parse the command line into a ``Settings`` dataclass.

    Args:
        flags: the dataclass. ``--batch-size`` and ``--batch_size`` both set its ``batch_size``; the fields of its
            bases (``DataConfig``) form groups in the help (data).
        args: the command-line arguments.
        module: the command's module, for messages.
        defaults: values by field name that replace the defaults of the dataclass.

    Raises:
        UsageError: unknown argument (the nearest known flag is suggested) or invalid value.
        SystemExit: after printing the help, if asked for.
    """
    parser = _Parser(
        prog=f"python -m {module}",
        description=flags.__doc__,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(flags, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(flags)}
    known: list[str] = []
    for base in reversed(flags.__mro__):
        own = [field for name, field in fields.items() if name in inspect.get_annotations(base)]
        is_group = base is not flags and own
        group = parser.add_argument_group(base.__name__.removesuffix("Config").lower()) if is_group else parser
        for field in own:
            known += _add_argument(group, field, hints[field.name], is_pair=is_group).option_strings
    positionals = [field.metadata["metavar"] for field in fields.values() if field.metadata["positional"]]
    parser.usage = " ".join(["%(prog)s", *positionals, "[options]"])
    end = args.index("--") if "--" in args else len(args)
    dashed = [_flag(arg) if arg.startswith("--") else arg for arg in args[:end]]
    given, unknown = parser.parse_known_intermixed_args([*dashed, *args[end:]])
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}{suggest(unknown[0], known)}")
    values = {**defaults, **vars(given)}
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:  # argparse would name it before unknown flags
            parser.error(f"{_flag(name)} is required")
    try:
        return flags(**values)
    except InvalidSettingError as error:
        parser.error(f"{_flag(error.name)} {error.problem}")


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of printing them and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps paragraphs apart, and flags and file names whole."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join("\n".join(self._split_lines(part, width)) for part in text.split("\n\n"))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def _flag(name: str) -> str:
    """``--batch-size`` for a field named ``batch_size``, or for ``--batch_size=5`` the same with its value."""
    name, equals, value = name.partition("=")
    return f"--{name.removeprefix('--').replace('_', '-')}{equals}{value}"


def _add_argument(
    group: "argparse.ArgumentParser | argparse._ArgumentGroup", field: dataclasses.Field, hint: Any, is_pair: bool
) -> argparse.Action:
    """Add the argument of a field; ``Settings`` converts its text.

    Args:
        group: where to add it.
        field: the field.
        hint: its annotation.
        is_pair: whether a switch can be turned off too, for example if a config file turns it on.
    """
    metadata = field.metadata
    kind, meta = type_and_meta(hint)
    options = {"help": metadata["help"]}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction if is_pair else "store_true"
    else:
        options["metavar"] = metadata["metavar"] or meta.title
    if typing.get_origin(kind) is tuple:
        options["nargs"] = "+" if ... in typing.get_args(kind) else len(typing.get_args(kind))
    if isinstance(field.default, int | float | str) and field.default is not False:
        options["help"] += f" (default: {'on' if field.default is True else field.default})"
    if metadata["positional"]:
        return group.add_argument(field.name, **options)
    return group.add_argument(_flag(field.name), dest=field.name, **options)


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
