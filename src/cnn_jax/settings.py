"""Dataclasses whose fields state their type, bounds and help text once, for Python, YAML and the command line."""

import dataclasses
import reprlib
import typing
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from cnn_jax.errors import UsageError


def choice(*values: int | str) -> Any:
    """Return the type of a value that is one of several."""
    names = [str(value) for value in values]
    description = f"{', '.join(names[:-1])} or {names[-1]}"
    return Annotated[Literal[*values], Meta(title=f"{{{','.join(names)}}}", description=description)]


# The title of a type is its placeholder in --help; its description completes the error message "... must be".
Count = Annotated[int, Meta(ge=1, lt=2**31, title="N", description="a positive integer below 2**31")]
Dimension = Annotated[int, Meta(ge=1, le=1024, title="N", description="an integer from 1 to 1024")]
Seed = Annotated[int, Meta(ge=0, lt=2**32, title="N", description="an integer from 0 to 2**32 - 1")]
Rate = Annotated[float, Meta(gt=0, lt=2**31, title="X", description="a positive number below 2**31")]
NonNegative = Annotated[float, Meta(ge=0, lt=2**31, title="X", description="at least 0 and below 2**31")]
Fraction = Annotated[float, Meta(ge=0, lt=1, title="X", description="at least 0 and less than 1")]
Probability = Annotated[float, Meta(ge=0, le=1, title="X", description="at least 0 and at most 1")]
PositiveFraction = Annotated[float, Meta(gt=0, le=1, title="X", description="greater than 0 and at most 1")]
Pixels = Annotated[int, Meta(ge=0, le=10_000, title="N", description="an integer from 0 to 10000")]
Duration = Annotated[
    str,
    Meta(
        pattern=r"\A[0-9]{1,9}(\.[0-9]{1,9})? ?(epochs?|steps?)\Z",
        title="DURATION",
        description="a number of epochs or steps, such as '2 epochs' or '500 steps'",
    ),
]
Index = Annotated[int, Meta(ge=0, lt=2**31, title="I", description="an integer from 0 to 2**31 - 1")]
Address = Annotated[
    str,
    Meta(
        pattern=r"\A[!-~]{1,255}:[0-9]{1,5}\Z", title="HOST:PORT", description="a host and a port, such as node1:12345"
    ),
]
Switch = Annotated[bool, Meta(description="true or false")]
Side = Annotated[int, Meta(ge=1, le=10_000)]
Channels = choice(1, 3)
Checkpoint = choice("newest", "best")
Size = Annotated[tuple[Side, Side], Meta(description="two integers from 1 to 10000")]

# No line breaks, null bytes or unencodable characters: file functions raise no error but OSError.
FilePath = Annotated[
    str,
    Meta(
        pattern=r"\A[^\0\n-\r\x1c-\x1e\x85\u2028\u2029\ud800-\udc7f\udd00-\udfff]{0,4096}\Z",
        title="PATH",
        description="a path",
    ),
]
# No control characters or surrogates; at most as long as a file name, or as a path in folder:PATH.
_PRINTABLE = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
Name = Annotated[
    str,
    Meta(pattern=rf"\A(folder:{_PRINTABLE}{{0,4096}}|{_PRINTABLE}{{0,200}})\Z", title="NAME", description="a name"),
]


class Range(NamedTuple):
    """The numbers from ``low`` to ``high``, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


class InvalidSettingError(UsageError):
    """A field was given a value of the wrong type or out of bounds.

    Attributes:
        name: the field.
        problem: what it must be and what it is, to be read after the name.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


class Settings:
    """Base of frozen dataclasses that are validated when created.

    Values are converted to the annotated types: text to numbers, as the command line and YAML 1.1 (``1e-3``) need it,
    integers to floats and lists to tuples.

    Raises:
        InvalidSettingError: a value of the wrong type or out of bounds.
    """

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if value == "none" and type(None) in typing.get_args(hint):
                value = None  # so that a flag can unset what a preset sets
            try:
                object.__setattr__(self, name, msgspec.convert(value, hint, strict=False))
            except (msgspec.ValidationError, UnicodeEncodeError):  # the latter for text with surrogates
                _, meta = type_and_meta(hint)
                raise InvalidSettingError(name, f"must be {meta.description}, not {show(value)}") from None


def setting(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    metavar: str | tuple[str, ...] | None = None,
    positional: bool = False,
    may_change: bool = False,
) -> Any:
    """Define a field of a ``Settings`` dataclass.

    Args:
        help: the help text of its flag, which explains a default of None.
        default: the default; without one, the field is required.
        metavar: the placeholder in ``--help``, instead of the type's title.
        positional: whether it is a positional argument instead of a flag.
        may_change: whether a resumed run may change it.
    """
    metadata = {"help": help, "metavar": metavar, "positional": positional, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def type_and_meta(hint: Any) -> tuple[Any, Meta]:
    """Return the type and constraints of an annotation ``Annotated[...]`` or ``Annotated[...] | None``."""
    annotated = next(part for part in (hint, *typing.get_args(hint)) if hasattr(part, "__metadata__"))
    return annotated.__origin__, annotated.__metadata__[0]


def show(value: Any) -> str:
    """Format a value for a message, in one short line."""
    if value and isinstance(value, list) and all(isinstance(word, str) for word in value):  # words of the command line
        value = " ".join(value)
    try:
        return reprlib.repr(value)
    except ValueError:  # Python converts no integer of more than 4300 digits to text
        return "a number of thousands of digits"
