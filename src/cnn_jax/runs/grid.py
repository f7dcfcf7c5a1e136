"""The settings of a sweep: those that are the same for all of its runs, and those that vary."""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.settings import InvalidSettingError

MAX_MEMBERS = 10_000
"""The maximum number of members of a sweep."""

MAX_NAME = 100
"""The maximum length of a member's name, which is that of its directory."""


@dataclass(frozen=True)
class Grid:
    """The settings of a sweep's members, which are the runs with every combination of the values that vary.

    Attributes:
        config: the settings of all members, but for those that vary.
        varied: the values of each setting that varies, by its name.

    Raises:
        UsageError: a setting has the same value twice, or there are too many combinations.
        InvalidSettingError: a value is of the wrong type or out of bounds.
    """

    config: Config
    varied: Mapping[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        varied = {name: tuple(self._converted(name, value) for value in values) for name, values in self.varied.items()}
        for name, values in varied.items():
            if len(set(values)) < len(values):
                raise UsageError(f"{name} has a value twice: {', '.join(map(str, values))}")
        object.__setattr__(self, "varied", varied)
        if self.num_members > MAX_MEMBERS:
            raise UsageError(
                f"the settings have {self.num_members} combinations, more than {MAX_MEMBERS}: leave some values out"
            )

    def _converted(self, name: str, value: Any) -> Any:
        return getattr(dataclasses.replace(self.config, **{name: value}), name)

    @property
    def settings(self) -> list[str]:
        """The names of the settings that vary, without the seed."""
        return [name for name in self.varied if name != "seed"]

    @property
    def num_members(self) -> int:
        """The number of members."""
        return math.prod(map(len, self.varied.values()))

    def members(self) -> dict[str, Config]:
        """The settings of each member, by its name; members that differ only in their seed are neighbors."""
        names = [*self.settings, *({"seed"} & self.varied.keys())]
        members: dict[str, Config] = {}
        for values in itertools.product(*(self.varied[name] for name in names)):
            chosen = dict(zip(names, values, strict=True))
            text = ",".join(f"{name}={value}" for name, value in chosen.items()) or "run"
            name = re.sub(r"[^\w.,=+-]+", "-", text, flags=re.ASCII)[:MAX_NAME]
            if name in members or len(text) > MAX_NAME:  # paths that differ in other characters, for example
                name = f"{len(members)}-{name}"
            members[name] = dataclasses.replace(self.config, **chosen)
        return members

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON."""
        varied = {name: list(values) for name, values in self.varied.items()}
        return {"settings": dataclasses.asdict(self.config), "varied": varied}

    @classmethod
    def from_json(cls, values: Any, source: str) -> Self:
        """Convert from the result of ``to_json``.

        Args:
            values: JSON, which is not trusted.
            source: where it comes from, for error messages.

        Raises:
            UsageError: invalid settings.
        """
        with reading_settings(source):
            return cls(Config.from_mapping(values["settings"], source), dict(values["varied"]))


@contextlib.contextmanager
def reading_settings(source: str) -> Iterator[None]:
    """Raise UsageError with the name of the source if JSON in this context has not the settings of a sweep."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UsageError(f"{source} does not contain the settings of a sweep: start a new one") from None
    except InvalidSettingError as error:
        raise UsageError(f"{source}: {error}") from None
