"""The settings of a search: those that are the same for all of its runs, and those that vary."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from cnn_jax.config import Config
from cnn_jax.runs.grid import reading_settings
from cnn_jax.settings import Range

if TYPE_CHECKING:
    import optuna

MAX_CORNERS = 64
"""The maximum number of combinations to check before a search."""

LOG_FACTOR = 10
"""A range whose ends differ by this factor or more is searched on a logarithmic scale."""


@dataclass(frozen=True)
class Space:
    """The settings of the members of a search, which are called trials by Optuna.

    Attributes:
        config: the settings of all members, but for those that vary.
        varied: the values to choose from of each setting that varies, or their range, by its name.
        num_members: the number of members.
    """

    config: Config
    varied: Mapping[str, tuple[Any, ...] | Range]
    num_members: int

    @property
    def settings(self) -> list[str]:
        """The names of the settings that vary."""
        return list(self.varied)

    def distributions(self) -> dict[str, "optuna.distributions.BaseDistribution"]:
        """Optuna's distribution of each setting that varies."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found = {}
        for name, values in self.varied.items():
            if isinstance(values, Range):
                kind = IntDistribution if isinstance(values.low, int) else FloatDistribution
                found[name] = kind(values.low, values.high, log=values.high >= LOG_FACTOR * values.low > 0)
            else:
                found[name] = CategoricalDistribution(values)
        return found

    def corners(self) -> Iterator[Config]:
        """The settings of every combination of values and ends of ranges, at most ``MAX_CORNERS``."""
        for values in itertools.islice(itertools.product(*self.varied.values()), MAX_CORNERS):
            yield dataclasses.replace(self.config, **dict(zip(self.varied, values, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON."""
        varied = {
            name: values._asdict() if isinstance(values, Range) else list(values)
            for name, values in self.varied.items()
        }
        return {"settings": dataclasses.asdict(self.config), "varied": varied, "trials": self.num_members}

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
            config, trials = Config.from_mapping(values["settings"], source), int(values["trials"])
            return cls(config, {name: _values(config, name, given) for name, given in values["varied"].items()}, trials)


def _values(config: Config, name: str, given: Any) -> tuple[Any, ...] | Range:
    """The valid values of a setting, from JSON."""
    is_range = isinstance(given, dict)
    values = [given["low"], given["high"]] if is_range else given
    valid = [getattr(dataclasses.replace(config, **{name: value}), name) for value in values]
    return Range(*valid) if is_range else tuple(valid)
