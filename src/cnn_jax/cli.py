"""Shared code of the commands: flags, one-line errors, exit status, signals."""

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
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn, Self, TypeVar

from cnn_jax import __version__
from cnn_jax.config import DETERMINISTIC_OPS
from cnn_jax.errors import CnnJaxError, UsageError, printable, suggest
from cnn_jax.files import expanded, private_directory, remove_own_temporaries, replacing, user_cache
from cnn_jax.processors import num_processors
from cnn_jax.settings import InvalidSettingError, Range, type_and_meta

Flags = TypeVar("Flags")

STDERR = 2
"""The file descriptor of standard error, even if ``sys.stderr`` is replaced."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a request to terminate, and a closed terminal or connection."""

SHOW_CURSOR = b"\x1b[?25h"
"""The escape sequence that shows the cursor, which the progress bar hides."""


def start(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a command and exit the process."""
    _open_standard_streams()
    _ignore_errors_of_other_threads()
    use_every_processor()
    os.environ["MPLBACKEND"] = "agg"  # the commands draw to files only
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home directory that cannot be written
    _keep_compiled_programs()
    try:
        status = run(main)
    except Exception:
        if not _is_distributed():
            raise
        traceback.print_exc()
        status = CnnJaxError.exit_status
    if status == CnnJaxError.exit_status:
        _discard(STDERR)  # threads of a failed save print tracebacks until the process ends
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
    _log_to_stderr()
    try:
        with _handling(_stop_at_once):
            return _flushing(main, sys.argv[1:])
    except CnnJaxError as error:
        say(f"error: {error}")
        return error.exit_status
    except OSError as error:
        if error.filename is None:  # standard output cannot be written, also not when Python exits
            reader_is_gone = isinstance(error, BrokenPipeError) and _reader_is_gone(sys.stdout.fileno())
            _discard(sys.stdout.fileno())
            if reader_is_gone:  # as in ``| head``, which has read all it needs
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


def say(message: object) -> None:
    """Print one line on standard error, or nothing if it cannot be written."""
    if not _accepts_writing(STDERR):  # nobody reads the pipe, and writing would wait forever
        return
    try:
        print(printable(message), file=sys.stderr, flush=True)
    except OSError:
        _discard(STDERR)


def _open_standard_streams() -> None:
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


class _Say(logging.Handler):
    """Logs to standard error with ``say``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message."""
        say(self.format(record))


def _log_to_stderr() -> None:
    logger = logging.getLogger("cnn_jax")
    logger.handlers = [_Say()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


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


def _flushing(main: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    # Output that cannot be written is an error here, not when Python exits.
    try:
        return main(args)
    finally:
        sys.stdout.flush()


@contextlib.contextmanager
def discarding_output() -> Iterator[None]:
    """Discard what libraries print on standard output inside this context, also those in C++."""
    sys.stdout.flush()
    output = os.dup(1)
    _discard(1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def _discard(descriptor: int) -> None:
    """Redirect a file descriptor to the null device, including what is still buffered."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _reader_is_gone(descriptor: int) -> bool:
    return bool(_poll(descriptor) & (select.POLLERR | select.POLLHUP))


def _accepts_writing(descriptor: int) -> bool:
    """Whether writing a line returns at once, with or without an error."""
    return _poll(descriptor) != 0


def _poll(descriptor: int) -> int:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return next((event for _, event in poll.poll(0)), 0)


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the stop signals inside this context; ignored signals stay ignored.

    Shells ignore Ctrl-C in background processes, and ``nohup`` ignores SIGHUP.
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
    # The signal may have interrupted print, and the reader may have exited, as ``tee`` does on Ctrl-C.
    with contextlib.suppress(OSError):
        if _accepts_writing(STDERR):
            os.write(STDERR, line)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Exit with a message and the exit status that a shell reports.

    This raises no exception because jax's callbacks would swallow it or be left in an inconsistent state.
    """
    remove_own_temporaries()
    _write_to_stderr((SHOW_CURSOR if os.isatty(STDERR) else b"") + b"interrupted\n")
    os._exit(128 + number)


class StopSignals:
    """Inside this context, a stop signal makes ``received`` true instead of ending the process.

    A signal before the first call of ``received``, when there is nothing to save, ends the process, as does a second.
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
        """Whether a stop signal was received."""
        self._asked = True
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """The exit status that a shell reports for the signal, or for SIGTERM if another process received one."""
        return 128 + (self._signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None or not self._asked:
            _stop_at_once(number, frame)  # nothing to wait for
        self._signal = number
        _write_to_stderr(b"stopping after this chunk; interrupt again to stop immediately\n")


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
    parser, given = _parse(flags, args, module)
    return _create(flags, parser, {**defaults, **given})


def parse_several(
    flags: type[Flags], args: Sequence[str], *, module: str, defaults: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Flags, dict[str, tuple[Any, ...] | Range]]:
    """Parse a command line on which the flags in groups, except switches and sizes, take several values.

    Numbers can also be ranges, such as ``1e-4..1e-1``.

    Args:
        flags: as in ``parse``.
        args: as in ``parse``.
        module: as in ``parse``.
        defaults: as in ``parse``.

    Returns:
        The dataclass with the first value of each flag, and all values of those flags that were given several, or a
        ``Range``.

    Raises:
        UsageError: as in ``parse``.
        SystemExit: as in ``parse``.
    """
    parser, given = _parse(flags, args, module, several=True)
    several = {name: values for name, values in given.items() if isinstance(values, _Several)}
    ranges = set()
    for name, values in several.items():
        kind, _ = type_and_meta(typing.get_type_hints(flags, include_extras=True)[name])
        low, _, high = values[0].partition("..")
        if kind in (int, float) and any(".." in value for value in values):
            if len(values) > 1:
                parser.error(f"{flag(name)} takes one range or several values, not both")
            if not low or not high:
                parser.error(f"{flag(name)} must be a range such as 1e-4..1e-1, not {values[0]!r}")
            several[name] = _Several([low, high])
            ranges.add(name)
    first = _create(flags, parser, {**defaults, **given, **{name: values[0] for name, values in several.items()}})
    changed: dict[str, tuple[Any, ...] | Range] = {}
    for name, values in several.items():
        if len(values) > 1:
            chosen = (getattr(_create(flags, parser, {**vars(first), name: value}), name) for value in values)
            changed[name] = Range(*chosen) if name in ranges else tuple(chosen)
    for name in ranges:
        if changed[name].low >= changed[name].high:
            parser.error(f"{flag(name)} must be a range from a smaller to a larger number, not {changed[name]}")
    return first, changed


def given(flags: type[Flags], args: Sequence[str], *, module: str) -> set[str]:
    """The names of the fields whose flags are on the command line of ``parse_several``. Raises the same errors."""
    return set(_parse(flags, args, module, several=True)[1])


class _Several(list):
    """The values of a flag that takes several."""


class _StoreSeveral(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, _Several(values))


def _create(flags: type[Flags], parser: "_Parser", values: Mapping[str, Any]) -> Flags:
    for field in dataclasses.fields(flags):
        if field.default is dataclasses.MISSING and field.name not in values:
            # argparse would name it before unknown flags
            parser.error(f"{flag(field.name)} is required")
    try:
        return flags(**values)
    except InvalidSettingError as error:
        parser.error(f"{flag(error.name)} {error.problem}")


def _parse(
    flags: type[Flags], args: Sequence[str], module: str, several: bool = False
) -> tuple["_Parser", dict[str, Any]]:
    """The parser of a command line, and the values by field name that were given on it, as text."""
    parser = _Parser(
        prog=f"python -m {module}",
        description=flags.__doc__,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cnn_jax {__version__}")
    hints = typing.get_type_hints(flags, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(flags)}
    known: list[str] = []
    for base in reversed(flags.__mro__):
        own = [field for name, field in fields.items() if name in inspect.get_annotations(base)]
        is_group = base is not flags and own
        group = parser.add_argument_group(base.__name__.removesuffix("Config").lower()) if is_group else parser
        for field in own:
            argument = _add_argument(group, field, hints[field.name], is_pair=is_group, several=several and is_group)
            known += argument.option_strings
    positionals = [field.metadata["metavar"] for field in fields.values() if field.metadata["positional"]]
    parser.usage = " ".join(["%(prog)s", *positionals, "[options]"])
    end = args.index("--") if "--" in args else len(args)
    dashed = [flag(arg) if arg.startswith("--") else arg for arg in args[:end]]
    given, unknown = parser.parse_known_intermixed_args([*dashed, *args[end:]])
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}{_suggest_argument(unknown[0], known)}")
    return parser, vars(given)


def _suggest_argument(given: str, known: Sequence[str]) -> str:
    """The end of an error message: a similar flag, one with these initials (``--lr``), or a path as a dataset."""
    if "--dataset" in known and not given.startswith("-") and Path(given).is_dir():
        return f"; did you mean '--dataset folder:{given}'?"
    initials = {"".join(word[0] for word in flag[2:].split("-")): flag for flag in known if flag.count("-") > 2}
    name, _, _ = given.partition("=")
    return suggest(initials.get(name.strip("-"), name), known)


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


def flag(name: str) -> str:
    """``--batch-size`` for a field named ``batch_size``, or for ``--batch_size=5`` the same with its value."""
    name, equals, value = name.partition("=")
    return f"--{name.removeprefix('--').replace('_', '-')}{equals}{value}"


def _add_argument(
    group: "argparse.ArgumentParser | argparse._ArgumentGroup",
    field: dataclasses.Field,
    hint: Any,
    *,
    is_pair: bool,
    several: bool,
) -> argparse.Action:
    """Add the argument of a field; ``Settings`` converts its text.

    Args:
        group: where to add it.
        field: the field.
        hint: its annotation.
        is_pair: whether a switch can be turned off too, for example if a config file turns it on.
        several: whether it takes several values, unless it is a switch or its value has parts.
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
    elif several and kind is not bool:
        options |= {"nargs": "+", "action": _StoreSeveral}
    if isinstance(field.default, int | float | str) and field.default is not False:
        options["help"] += f" (default: {'on' if field.default is True else field.default})"
    if metadata["positional"]:
        return group.add_argument(field.name, **options)
    return group.add_argument(flag(field.name), dest=field.name, **options)


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


def use_every_processor() -> None:
    """Make each processor a jax device; existing environment variables win. Call it before jax initializes."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):  # the older setting
        return
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(num_processors()))


def initialize_jax(*, deterministic: bool = False) -> None:
    """Import jax and initialize its devices, which environment variables may prevent.

    Args:
        deterministic: whether operations on GPUs have to be bitwise reproducible.

    Raises:
        UsageError: jax cannot be imported, or has no device.
    """
    if deterministic:  # XLA reads its flags once, now
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC_OPS}"
    try:
        import jax

        jax.devices()
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error).partition("\n")[0], 120) or "there is no such device"
        raise UsageError(
            f"jax cannot start ({reason}): check JAX_PLATFORMS, JAX_NUM_CPU_DEVICES and XLA_FLAGS"
        ) from None


def _keep_compiled_programs() -> None:
    """Keep jax's compiled programs in the user's cache; existing environment variables win.

    Compiled programs are executed, so only the user may have access to the cache.
    """
    try:
        cache = user_cache() / "compiled"
    except CnnJaxError:  # no home directory
        return
    if not private_directory(cache):
        return
    # Environment variables, because jax is not imported yet.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if os.environ["JAX_COMPILATION_CACHE_DIR"] == str(cache):
        _repair_damaged_entries(cache)


def _repair_damaged_entries(cache: Path) -> None:
    """Remove damaged entries of the compilation cache when jax warns about them.

    jax then compiles the program, but does not overwrite the entry.
    """
    show_warning = warnings.showwarning

    def showwarning(message: Warning | str, *details: Any, **options: Any) -> None:
        if match := re.match(r"Error reading persistent compilation cache entry for '([^']+)'", str(message)):
            for entry in cache.glob(f"{glob.escape(match[1])}-*"):
                entry.unlink(missing_ok=True)
        else:
            show_warning(message, *details, **options)

    warnings.showwarning = showwarning
    warnings.filterwarnings("always", "Error reading persistent compilation cache entry")  # also with PYTHONWARNINGS
