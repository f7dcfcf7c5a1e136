"""The results of a sweep as text, JSON, CSV, a plot and a page."""

import base64
import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cnn_jax.config import Config
from cnn_jax.errors import printable
from cnn_jax.report.plots import COLORS
from cnn_jax.report.tables import finite, format_setting
from cnn_jax.report.templates import render

MAX_PLOTTED = 40
"""The maximum number of combinations in the plot: the best ones."""


class Result(NamedTuple):
    """What became of a member of a sweep.

    Attributes:
        name: its name, which is that of its run directory.
        config: its settings.
        summary: the content of its ``summary.json``; None if it has not finished.
        error: why it ended before, such as a loss that is not finite; None if it did not.
        is_pruned: whether it ended before because a search stopped it.
    """

    name: str
    config: Config
    summary: Mapping[str, Any] | None = None
    error: str | None = None
    is_pruned: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to train."""
        return self.summary is not None or self.error is not None

    @property
    def reached_target(self) -> bool:
        """Whether a finished member has its ``target_accuracy``; True without one."""
        target = self.config.target_accuracy
        return target is None or self.summary.get("validation_accuracy", self.summary["test_accuracy"]) >= target

    def line(self) -> str:
        """The line that the command prints."""
        if self.summary is None:
            return f"{self.name}: {self.error}"
        metrics = ("validation_accuracy", "test_accuracy", "test_loss")
        scores = [f"{metric}: {self.summary[metric]:.4f}" for metric in metrics if metric in self.summary]
        return " ".join([self.name, *scores, f"seconds: {self.summary['train_seconds']:.2f}"])


class Statistics(NamedTuple):
    """Statistics of the finished members of a combination.

    Attributes:
        mean: the mean.
        std: the standard deviation of a sample; None for a single member.
        n: the number of members.
        best: the highest value.
    """

    mean: float
    std: float | None
    n: int
    best: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistics":
        """The statistics of at least one value."""
        std = None
        if len(values) > 1:  # a loss may be infinite
            std = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
        return cls(statistics.fmean(values), std, len(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.std is None else f"{self.mean:.4f} ± {self.std:.4f}"


@dataclass(frozen=True)
class Combination:
    """The members with the same settings but for the seed.

    Attributes:
        settings: the values of the settings that vary, by name.
        results: what became of each member.
    """

    settings: Mapping[str, Any]
    results: Sequence[Result]

    @property
    def label(self) -> str:
        """The settings in one line."""
        return printable(", ".join(f"{name} {_show(value)}" for name, value in self.settings.items())) or "all"

    def values(self, metric: str) -> list[float]:
        """A metric of each member whose summary has it."""
        return [result.summary[metric] for result in self.results if result.summary and metric in result.summary]

    def statistics(self, metric: str) -> Statistics | None:
        """Statistics of a metric; None if no member has it."""
        values = self.values(metric)
        return Statistics.of(values) if values else None

    @property
    def num_failed(self) -> int:
        """The number of members whose loss is not finite."""
        return sum(result.error is not None and not result.is_pruned for result in self.results)

    @property
    def num_unfinished(self) -> int:
        """The number of members that are still to be trained."""
        return sum(not result.is_done for result in self.results)


def combinations(results: Sequence[Result], settings: Sequence[str]) -> list[Combination]:
    """The combinations of settings, those with the highest mean accuracy first.

    That is the accuracy on the validation split, or on the test split without one.

    Args:
        results: the members, with validation accuracies in the summaries of all that have finished, or of none.
        settings: the names of the settings that vary, without the seed.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result.config, name) for name in settings), []).append(result)
    found = [Combination(dict(zip(settings, values, strict=True)), members) for values, members in groups.items()]
    metric = selection_metric(results)

    def mean(combination: Combination) -> float:
        scores = combination.statistics(metric)
        return -math.inf if scores is None else scores.mean

    return sorted(found, key=mean, reverse=True)


def selection_metric(results: Sequence[Result]) -> str:
    """The metric to choose settings by: ``"validation_accuracy"``, or ``"test_accuracy"`` if there is no validation."""
    has_validation = any(result.summary and "validation_accuracy" in result.summary for result in results)
    return "validation_accuracy" if has_validation else "test_accuracy"


def as_text(results: Sequence[Result], settings: Sequence[str]) -> str:
    """A table with a line per combination, or lines such as ``test_accuracy: 0.9 ± 0.1 (n=3)`` for a single one."""
    found = combinations(results, settings)
    metrics = dict.fromkeys((selection_metric(results), "test_accuracy"))
    if len(found) == 1:
        lines = [f"{metric}: {_with_count(found[0], metric)}" for metric in metrics]
        return "\n".join([*lines, *_remarks(found)])
    has_seeds = len(results) > len(found)
    rows = [[*settings, *metrics, *(["best", "n"] if has_seeds else ["network"]), "seconds"]]
    for combination in found:
        scores = [combination.statistics(metric) for metric in metrics]
        seconds = combination.statistics("train_seconds")
        rows.append(
            [
                *(printable(_show(value)) for value in combination.settings.values()),
                *("-" if score is None else str(score) for score in scores),
                *(_best_and_count(scores[0]) if has_seeds else [combination.results[0].name]),
                "-" if seconds is None else f"{seconds.mean:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_remarks(found)])


def _best_and_count(scores: Statistics | None) -> list[str]:
    return ["-", "0"] if scores is None else [f"{scores.best:.4f}", str(scores.n)]


def _with_count(combination: Combination, metric: str) -> str:
    scores = combination.statistics(metric)
    return "none (n=0)" if scores is None else f"{scores} (n={scores.n})"


def _remarks(found: Sequence[Combination]) -> list[str]:
    """Lines about members that are not in the statistics."""
    counts = {
        "failed": sum(combination.num_failed for combination in found),
        "pruned": sum(result.is_pruned for combination in found for result in combination.results),
        "unfinished": sum(combination.num_unfinished for combination in found),
    }
    return [f"{name}: {count}" for name, count in counts.items() if count]


def as_json(results: Sequence[Result], settings: Sequence[str]) -> dict[str, Any]:
    """The same, and the result of each member, as values that can be converted to JSON."""
    metrics = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "train_seconds")

    table = {
        "selection_metric": selection_metric(results),
        "combinations": [
            {
                "settings": dict(combination.settings),
                **{
                    metric: {
                        name: value
                        for name, value in scores._asdict().items()
                        if name != "best" or metric.endswith("accuracy")
                    }
                    for metric in metrics
                    if (scores := combination.statistics(metric)) is not None
                },
                "failed": combination.num_failed,
                "pruned": sum(result.is_pruned for result in combination.results),
                "unfinished": combination.num_unfinished,
            }
            for combination in combinations(results, settings)
        ],
        "members": [_row(result, settings) for result in results],
    }
    return finite(table)


def as_csv(results: Sequence[Result], settings: Sequence[str]) -> str:
    """A row for each member."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(_row(Result("", Config()), settings)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(result, settings) for result in results)
    return file.getvalue()


def _row(result: Result, settings: Sequence[str]) -> dict[str, Any]:
    summary = result.summary or {}
    metrics = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "best_accuracy", "epochs")
    return {
        "member": result.name,
        **{name: getattr(result.config, name) for name in settings},
        "seed": result.config.seed,
        **{metric: summary.get(metric) for metric in (*metrics, "train_seconds")},
        "error": result.error,
    }


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else format_setting(value)


def save_plot(path: Path, results: Sequence[Result], settings: Sequence[str]) -> None:
    """Plot the accuracy of each finished member, in a row for each combination with its mean and standard deviation.

    Args:
        path: the PNG file to write.
        results: the members; at least one has finished.
        settings: the names of the settings that vary, without the seed.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    metric = selection_metric(results)
    found = [found for found in combinations(results, settings) if found.statistics(metric)][:MAX_PLOTTED]
    with style.context("default"):
        figure = Figure(figsize=(9, 1.2 + 0.4 * len(found)), layout="constrained")
        axes = figure.subplots()
        for row, combination in enumerate(found):
            scores, values = combination.statistics(metric), combination.values(metric)
            axes.errorbar(scores.mean, row, xerr=scores.std, fmt="|", color=COLORS["ink"], markersize=14, zorder=2)
            axes.plot(values, [row] * len(values), "o", color=COLORS["test"], alpha=0.6, markersize=5)
        axes.set_yticks(range(len(found)), [combination.label for combination in found])
        for label in axes.get_yticklabels():
            label.set_parse_math(False)  # settings may contain anything
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlabel(f"{metric.replace('_', ' ')}: each network, and the mean ± standard deviation")
        axes.grid(axis="x", color=COLORS["rule"])
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.savefig(path, dpi=120)


def save_page(
    path: Path,
    config: Config,
    results: Sequence[Result],
    settings: Sequence[str],
    pictures: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write the results as an HTML file without scripts or external resources.

    Args:
        path: the file to write.
        config: the settings of all members, but for those that vary.
        results: the members; at least one has finished.
        settings: the names of the settings that vary, without the seed.
        pictures: PNG files to include, by their names.
    """
    metric = selection_metric(results)
    found = combinations(results, settings)
    values = [value for combination in found for value in combination.values(metric)]
    for scores in filter(None, (combination.statistics(metric) for combination in found)):
        values += [scores.mean - (scores.std or 0), scores.mean + (scores.std or 0)]
    margin = 0.05 * (max(values) - min(values)) or 0.01
    low, high = min(values) - margin, max(values) + margin
    default = Config()
    shared = {field: value for field, value in vars(config).items() if field not in (*settings, "seed")}
    render(
        path,
        "sweep.html.j2",
        config=config,
        results=results,
        settings=settings,
        metric=metric,
        metrics=list(dict.fromkeys((metric, "test_accuracy"))),
        combinations=found,
        show=_show,
        pictures={name: base64.b64encode(content).decode() for name, content in pictures.items()},
        low=low,
        high=high,
        place=lambda value: f"{100 * (value - low) / (high - low):.2f}%",
        shared={name: _show(value) for name, value in shared.items() if value != getattr(default, name)},
    )
