"""Command lines, parsed into ``Settings`` dataclasses."""

import argparse
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from cnn_jax import __version__
from cnn_jax.errors import UsageError, suggest
from cnn_jax.settings import InvalidSettingError, Range, type_and_meta

Flags = TypeVar("Flags")


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
