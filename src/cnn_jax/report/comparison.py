"""A comparison of runs as text, as JSON and as an HTML page."""

import dataclasses
import io
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cnn_jax.errors import printable
from cnn_jax.report.plots import LINE_WIDTH, METRICS, RUN_COLORS, overlay_svg, run_line
from cnn_jax.report.tables import (
    best_epoch,
    finite,
    format_duration,
    format_metric,
    format_setting,
    metrics_by_split,
)
from cnn_jax.report.templates import render
from cnn_jax.training.comparison import Comparison, ImageResults, Pair, RunResult
from cnn_jax.training.mcnemar import PairedCounts

UNKNOWN = "-"
"""What tables show instead of an unknown value."""

MAX_NAMES = 3
"""The maximum number of classes to name."""

MAX_WIDTH = 18
"""The maximum width of a column of text, in characters; longer values continue in the next line."""

DIGEST_LENGTH = 12
"""The number of hexadecimal digits of a digest to show."""


def as_text(comparison: Comparison, width: int | None = None) -> str:
    """A comparison as plain text.

    Args:
        comparison: the comparison.
        width: the maximum length of a line, for which runs are distributed to several tables; None for any length.
    """
    names = [run.name for run in comparison.runs]
    tables = {"differences": _differences(comparison), "results": _results(comparison)}
    parts = [
        _table(title, names, rows, width) if rows else f"no {title} in settings and data\n"
        for title, rows in tables.items()
    ]
    return "\n".join([*parts, *_tests(comparison)])


def to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as values that can be converted to JSON; numbers that are not finite become None."""
    return finite(
        {
            "runs": [_run_to_json(run) for run in comparison.runs],
            "differences": comparison.differences,
            "pairs": [_pair_to_json(pair) for pair in comparison.pairs],
        }
    )


def save_page(path: Path, comparison: Comparison) -> None:
    """Write a comparison as an HTML file without scripts or external resources."""
    render(
        path,
        "comparison.html.j2",
        comparison=comparison,
        names=[run.name for run in comparison.runs],
        lines=[run_line(index) for index in range(len(comparison.runs))],
        line_width=LINE_WIDTH,
        run_colors=RUN_COLORS,
        accuracies=[_metric(run.test_accuracy) for run in comparison.runs],
        ranked=_ranked(comparison.runs),
        differences=_differences(comparison),
        results=_results(comparison),
        charts=_charts(comparison.runs),
        pairs=[_pair_row(pair) for pair in comparison.pairs],
        reasons=_reasons(comparison.runs),
    )


def _differences(comparison: Comparison) -> dict[str, list[str]]:
    """The rows of the table of what differs: a text for each run, by the name of the setting or property."""
    rows = {}
    for name, values in comparison.differences.items():
        match name:
            case "image_shape":
                rows[name] = ["x".join(map(str, shape)) for shape in values]
            case "class_names":
                rows[name] = _class_names(values)
            case "data_sha256":
                rows[name] = [digest[:DIGEST_LENGTH] for digest in values]
            case _ if any(name in run.versions for run in comparison.runs):
                rows[name] = [value or UNKNOWN for value in values]
            case _:
                rows[name] = list(map(format_setting, values))
    return rows


def _class_names(runs: Sequence[Sequence[str]]) -> list[str]:
    """The number of classes of each run, and those that not all runs have."""
    common = set.intersection(*map(set, runs))
    texts = []
    for names in runs:
        own = [reprlib.repr(name)[1:-1] for name in names if name not in common]
        shown = ", ".join([*own[:MAX_NAMES], *["..."] * (len(own) > MAX_NAMES)])
        texts.append(f"{len(names)}, with {shown}" if own else f"{len(names)}")
    return texts if len(set(texts)) > 1 else [f"{text}, in another order" for text in texts]


def _results(comparison: Comparison) -> dict[str, list[str]]:
    """The rows of the table of results: a text for each run; without rows in which nothing is known."""
    columns = [_run_results(run) for run in comparison.runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return {name: row for name, row in rows.items() if set(row) != {UNKNOWN}}


def _run_results(run: RunResult) -> dict[str, str]:
    last = run.history[-1] if run.history else None
    best = best_epoch(run.history) if run.history else None
    epochs, planned = len(run.history), run.config.epochs
    split = "test" if best is None or best.validation_accuracy is None else "validation"
    return {
        "test accuracy": _metric(run.test_accuracy),
        "test loss": _metric(run.test_loss),
        "validation accuracy": _metric(last and last.validation_accuracy),
        "validation loss": _metric(last and last.validation_loss),
        "best epoch": UNKNOWN if best is None else f"{best.epoch:,}",
        "its accuracy": UNKNOWN if best is None else f"{_metric(best.selection_accuracy)} ({split})",
        "epochs": f"{epochs:,}" if epochs == planned else f"{epochs:,} of {planned:,}",
        "steps": f"{run.step:,}",
        "parameters": f"{run.num_parameters:,}",
        "training time": format_duration(run.train_seconds) if run.history else UNKNOWN,
        "images per second": UNKNOWN if run.images_per_second is None else _count(run.images_per_second),
        "compilation": UNKNOWN if run.compile_seconds is None else format_duration(run.compile_seconds),
        "device": UNKNOWN if run.device is None else f"{run.backend.upper()}: {run.device}",
        "number of devices": UNKNOWN if run.device_count is None else f"{run.device_count:,}",
    }


def _ranked(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs whose test accuracy is known, the highest first."""
    known = [run for run in runs if run.test_accuracy is not None and math.isfinite(run.test_accuracy)]
    return sorted(known, key=lambda run: run.test_accuracy, reverse=True)


def _metric(value: float | None) -> str:
    return UNKNOWN if value is None else format_metric(value)


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else format_metric(value)


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[str]], width: int | None) -> str:
    """A table with a column for each run, or several tables if that would be too wide."""
    label_width = max(map(cell_len, (title, *rows)))
    widths = [
        min(MAX_WIDTH, max(cell_len(printable(cell)) for cell in (name, *(row[index] for row in rows.values()))))
        for index, name in enumerate(names)
    ]
    groups: list[list[int]] = [[]]
    for index in range(len(names)):
        used = label_width + sum(2 + widths[member] for member in (*groups[-1], index))
        if groups[-1] and width is not None and used > width:
            groups.append([])
        groups[-1].append(index)
    return "\n".join(
        _one_table([title, *(names[index] for index in group)], {n: [row[i] for i in group] for n, row in rows.items()})
        for group in groups
    )


def _one_table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for column, name in enumerate(head):
        table.add_column(Text(printable(name)), max_width=MAX_WIDTH if column else None, overflow="fold")
    for name, row in rows.items():
        table.add_row(*(Text(printable(cell)) for cell in (name, *row)))
    file = io.StringIO()
    Console(file=file, width=10_000, color_system=None, force_jupyter=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def _reasons(runs: Sequence[RunResult]) -> dict[str, str]:
    """Why runs were not evaluated, by their names."""
    return {run.name: run.images for run in runs if not isinstance(run.images, ImageResults)}


def _tests(comparison: Comparison) -> list[str]:
    """Paragraphs about McNemar's test of each pair of runs that were evaluated."""
    reasons = _reasons(comparison.runs)
    lines = [f"{name} was not evaluated: {reason}" for name, reason in reasons.items()]
    paragraphs = ["".join(f"{printable(line)}\n" for line in lines)] if lines else []
    for pair in comparison.pairs:
        if isinstance(pair.counts, PairedCounts):
            paragraphs.append(_test(pair, comparison.num_tests))
        elif not {pair.first, pair.second} & reasons.keys():
            paragraphs.append(f"{_heading(pair)}: not compared image by image, because {printable(pair.counts)}\n")
    if comparison.num_tests:
        paragraphs.append(
            "In brackets: 95 % confidence interval (Bonett and Price). p: McNemar's exact test.\n"
            "Both are about these networks, not their settings: another seed gives others.\n"
        )
    return paragraphs


def _heading(pair: Pair) -> str:
    return printable(f"{pair.first} and {pair.second}")


def _test(pair: Pair, num_tests: int) -> str:
    row = _pair_row(pair)
    adjusted = f", with Holm's correction for {num_tests} tests {row['adjusted']}" if num_tests > 1 else ""
    return (
        f"{_heading(pair)}: {row['images']} test images of both\n"
        f"  accuracy {row['accuracies'][0]} and {row['accuracies'][1]}: difference {row['difference']} "
        f"({row['interval'][0]} to {row['interval'][1]})\n"
        f"  only the first is right: {row['only_first']}, only the second: {row['only_second']}\n"
        f"  p = {row['p']}{adjusted}\n"
    )


def _pair_row(pair: Pair) -> dict[str, Any]:
    """The texts about a pair of runs: names, and results or the reason why there are none."""
    names = {"first": pair.first, "second": pair.second}
    if not isinstance(pair.counts, PairedCounts):
        return names | {"reason": pair.counts}
    counts = pair.counts
    return names | {
        "reason": None,
        "images": f"{len(counts):,}",
        "accuracies": [f"{accuracy:.4f}" for accuracy in counts.accuracies],
        "difference": f"{counts.difference:+.4f}",
        "interval": [f"{limit:+.4f}" for limit in counts.interval],
        "only_first": f"{counts.only_first:,}",
        "only_second": f"{counts.only_second:,}",
        "p": f"{counts.p_value:.3g}",
        "adjusted": f"{pair.adjusted_p_value:.3g}",
    }


def _run_to_json(run: RunResult) -> dict[str, Any]:
    best = best_epoch(run.history) if run.history else None
    return {
        "name": run.name,
        "workdir": str(run.workdir),
        "step": run.step,
        "test_accuracy": run.test_accuracy,
        "test_loss": run.test_loss,
        "not_evaluated": run.images if isinstance(run.images, str) else None,
        "best_epoch": best and best.epoch,
        "best_accuracy": best and best.selection_accuracy,
        "epochs": len(run.history),
        "num_parameters": run.num_parameters,
        "train_seconds": run.train_seconds,
        "images_per_second": run.images_per_second,
        "compile_seconds": run.compile_seconds,
        "backend": run.backend,
        "device": run.device,
        "device_count": run.device_count,
        "versions": dict(run.versions),
        "image_shape": run.image_shape,
        "class_names": run.class_names,
        "data_sha256": run.data_sha256,
        "config": dataclasses.asdict(run.config),
        "history": [record.to_json() for record in run.history],
    }


def _pair_to_json(pair: Pair) -> dict[str, Any]:
    names = {"first": pair.first, "second": pair.second}
    if not isinstance(pair.counts, PairedCounts):
        return names | {"not_compared": pair.counts}
    counts = pair.counts
    return names | {
        "not_compared": None,
        "examples": len(counts),
        **dataclasses.asdict(counts),
        "accuracies": counts.accuracies,
        "difference": counts.difference,
        "interval": counts.interval,
        "p_value": counts.p_value,
        "adjusted_p_value": pair.adjusted_p_value,
    }


def _charts(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """A chart and a table for each metric that a run has."""
    from markupsafe import Markup

    curves = {run.name: _metrics(run) for run in runs}
    charts = []
    for split in ("validation", "test", "train"):
        for metric in METRICS:
            chosen = {name: metrics.get((split, metric), {}) for name, metrics in curves.items()}
            if any(chosen.values()):
                title = f"{split.capitalize()} {metric}"
                epochs = sorted({epoch for curve in chosen.values() for epoch in curve})
                rows = [(epoch, [_metric(curve.get(epoch)) for curve in chosen.values()]) for epoch in epochs]
                charts.append({"title": title, "svg": Markup(overlay_svg(title, metric, chosen)), "rows": rows})
    return charts


def _metrics(run: RunResult) -> dict[tuple[str, str], dict[int, float]]:
    """The values of each metric of each split, by epoch."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for record in run.history:
        for split, values in metrics_by_split(record, max(1, run.history[0].step)).items():
            for metric, value in values.items():
                curves.setdefault((split, metric), {})[record.epoch] = value
    return curves
