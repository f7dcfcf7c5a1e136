"""Learning curves and the confusion matrix, drawn with matplotlib."""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array

from cnn_jax.report.tables import confusion_counts, format_metric, metrics_by_split
from cnn_jax.training.history import EpochRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {"loss": ("Loss", "mean cross-entropy"), "accuracy": ("Accuracy", "fraction correctly classified")}
"""The title and the y-axis label of each metric's chart."""

COLORS = {
    "ink": "#1b1b19",
    "muted": "#62605a",
    "rule": "#dcd9d0",
    "train": "#96570a",
    "validation": "#7a3f9d",
    "test": "#14568f",
}
"""The light theme's colors, by the names of the page's CSS variables."""

RUN_COLORS = {"run-1": "#14568f", "run-2": "#96570a", "run-3": "#1a6840", "run-4": "#7a3f9d", "run-5": "#ab1f2d"}
"""The light theme's colors of the runs in one chart, by the names of CSS variables."""

RUN_DASHES = ((), (6, 2), (1.5, 1.5), (7, 2, 1.5, 2))
"""The dashes of their lines, in points: with the colors, these make 20 different lines."""

LINE_WIDTH = 1.5
"""The width of a line in points."""

MAX_MARKERS = 30
"""The maximum number of epochs for which each epoch has a marker."""

FEW_CLASSES = 20
"""The maximum number of classes for which the confusion matrix has large cells, and zeros."""

MAX_NUMBERED = 50
"""The maximum number of classes for which the cells of the confusion matrix have numbers: each is slow to draw."""

MAX_NAMED = 200
"""The maximum number of classes for which the rows and columns of the confusion matrix have names."""

CELL_SIZES = {FEW_CLASSES: 0.7, MAX_NUMBERED: 0.4, MAX_NAMED: 0.1}
"""Inches of the picture for each class, up to a number of classes: four digits, three digits, or a name have room."""

MAX_CELLS = 500
"""The maximum number of classes with a row and a column of their own in the confusion matrix."""

LABEL_HEIGHT = 0.08
"""The distance to keep between the labels of two curves, as a fraction of the height of the axes."""

SVG_OVERHEAD = re.compile(
    r'<defs>\s*<style.*?</defs>|<g id="patch_\d+">.*?</g>|<g id="[^"]*"/>| id="[^"]*_[^"]*"'
    r'| transform="rotate\(-0 [^"]*"|(?<=\.\d\d)\d+(?=[ "\n])|^ +|^\n',
    re.DOTALL | re.MULTILINE,
)
"""What is removed from inline SVG: the global style, backgrounds, ids of groups, more than two decimal places."""


def save_curves(path: Path, history: Sequence[EpochRecord], steps_per_epoch: int) -> None:
    """Plot loss and accuracy by epoch, with a curve for each split.

    Args:
        path: the PNG file to write.
        history: at least one epoch.
        steps_per_epoch: the number of steps to average the training loss over.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(figsize=(10.8, 3.6), layout="constrained")
        for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
            _draw_curves(axes, metric, history, steps_per_epoch)
        figure.savefig(path, dpi=120)


def curves_svg(metric: str, history: Sequence[EpochRecord], steps_per_epoch: int) -> str:
    """One chart of ``save_curves`` as an ``<svg>`` element to embed in HTML.

    Its colors are CSS variables, by the names in ``COLORS``.

    Args:
        metric: a key of ``METRICS``.
        history: at least one epoch.
        steps_per_epoch: the number of steps to average the training loss over.
    """
    return _svg(metric, COLORS, lambda axes: _draw_curves(axes, metric, history, steps_per_epoch))


def overlay_svg(title: str, metric: str, curves: Mapping[str, Mapping[int, float]]) -> str:
    """A chart of one metric of several runs, as an ``<svg>`` element to embed in HTML; a legend is not included.

    The color and the dashes of a run are those that ``run_line`` returns for its place in the mapping.

    Args:
        title: what the chart shows.
        metric: a key of ``METRICS``.
        curves: values by epoch, by the name of the run; empty for runs that are not to be shown. At least one is not.
    """
    colors = {name: COLORS[name] for name in ("ink", "muted", "rule")} | RUN_COLORS
    return _svg(title, colors, lambda axes: _draw_overlay(axes, title, metric, curves))


def run_line(index: int) -> tuple[str, tuple[float, ...]]:
    """The name of the color, and the dashes in points, of the line of the run with an index, counted from 0."""
    return tuple(RUN_COLORS)[index % len(RUN_COLORS)], RUN_DASHES[index % len(RUN_DASHES)]


class _Texts(NamedTuple):
    """The text alternative of a chart, and a tooltip for each marker, in drawing order."""

    label: str
    tooltips: list[str]


def _svg(salt: str, colors: Mapping[str, str], draw: Callable[["Axes"], _Texts]) -> str:
    """A chart as an ``<svg>`` element, with CSS variables instead of colors.

    Args:
        salt: makes ids in the chart differ from those in other charts of the page.
        colors: the colors by the names of the variables.
        draw: draws the chart and returns its texts.
    """
    from markupsafe import escape
    from matplotlib import style
    from matplotlib.figure import Figure

    # This font affects the layout only: the page's style sheet sets another.
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.sans-serif": ["DejaVu Sans"]}
    with style.context(["default", settings]):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        texts = draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = SVG_OVERHEAD.sub("", file.getvalue())
    for name, color in colors.items():
        svg = svg.replace(color, f"var(--{name})")
    tooltips = iter(texts.tooltips)
    svg = re.sub(r"(<use [^>]*)/>", lambda use: f"{use[1]}><title>{escape(next(tooltips))}</title></use>", svg)
    attributes = f'role="img" aria-label="{escape(texts.label)}"'
    root = r'.*<svg [^>]*(viewBox="[^"]*")[^>]*>'
    return re.sub(root, lambda match: f"<svg {match[1]} {attributes}>", svg, count=1, flags=re.DOTALL)


def _draw_curves(axes: "Axes", metric: str, history: Sequence[EpochRecord], steps_per_epoch: int) -> _Texts:
    """Draw a curve for each split, labeled with its last value."""
    splits = metrics_by_split(history[-1], steps_per_epoch)
    curves = {
        split: {record.epoch: metrics_by_split(record, steps_per_epoch)[split][metric] for record in history}
        for split in splits
    }
    last = history[-1].epoch
    _set_up(axes, METRICS[metric][0], metric, last, curves.values())

    heights = axes.transLimits.transform([(last, curve[last]) for curve in curves.values()])[:, 1]
    heights = np.nan_to_num(heights, nan=1, posinf=1)
    for lower, upper in len(curves) * list(pairwise(np.argsort(heights))):
        overlap = max(0, LABEL_HEIGHT - heights[upper] + heights[lower])
        heights[lower] -= overlap / 2
        heights[upper] += overlap / 2
    tooltips = []
    for (split, curve), height in zip(curves.items(), heights, strict=True):
        marked = _draw_line(axes, curve, color=COLORS[split], markersize=4)
        axes.annotate(
            f"{split} {format_metric(curve[last])}",
            (last, height),
            xycoords=("data", "axes fraction"),
            xytext=(9, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=COLORS[split],
        )
        tooltips += [f"epoch {epoch}, {split}: {format_metric(value)}" for epoch, value in marked]
    ends = ", ".join(text.get_text() for text in axes.texts)
    return _Texts(f"{METRICS[metric][0]} by epoch, at the end: {ends}", tooltips)


def _draw_overlay(axes: "Axes", title: str, metric: str, curves: Mapping[str, Mapping[int, float]]) -> _Texts:
    """Draw a curve for each run that has one."""
    _set_up(axes, title, metric, max(max(curve) for curve in curves.values() if curve), curves.values())
    ends, tooltips = [], []
    for index, (name, curve) in enumerate(curves.items()):
        if not curve:
            continue
        color, dashes = run_line(index)
        pattern = (0, [length / LINE_WIDTH for length in dashes]) if dashes else "solid"
        marked = _draw_line(axes, curve, color=RUN_COLORS[color], markersize=3, linewidth=LINE_WIDTH, linestyle=pattern)
        tooltips += [f"epoch {epoch}, {name}: {format_metric(value)}" for epoch, value in marked]
        ends.append(f"{name} {format_metric(curve[max(curve)])}")
    return _Texts(f"{title} by epoch, at the end: {', '.join(ends)}", tooltips)


def _draw_line(
    axes: "Axes", curve: Mapping[int, float], *, color: str, markersize: float, **style: Any
) -> list[tuple[int, float]]:
    """Draw the finite values of a curve; return those with a marker, as (epoch, value)."""
    finite = [(epoch, value) for epoch, value in curve.items() if math.isfinite(value)]
    marked = finite if len(curve) <= MAX_MARKERS else finite[-1:]
    axes.plot(*np.reshape(finite, (-1, 2)).T, color=color, clip_on=False, **style)
    axes.plot(*np.reshape(marked, (-1, 2)).T, "o", color=color, markersize=markersize, clip_on=False)
    return marked


def _set_up(axes: "Axes", title: str, metric: str, last: int, curves: Iterable[Mapping[int, float]]) -> None:
    """Set limits, ticks and labels for curves of a metric up to an epoch."""
    from matplotlib.ticker import MaxNLocator

    values = [value for curve in curves for value in curve.values() if math.isfinite(value)] or [0]
    # Accuracies are compared near their top, which an axis from 0 would compress.
    low, high = (0, max(values) or 1) if metric == "loss" else (min(values) - 0.01, max(values) + 0.01)
    y_ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(max(0, low), high if metric == "loss" else min(1, high))
    x_ticks = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True).tick_values(0, last or 1)
    axes.set(ylim=(y_ticks[0], y_ticks[-1]), yticks=y_ticks)
    axes.set(xlim=(0, last) if last else (-1, 1), xticks=[tick for tick in x_ticks if 0 <= tick <= last])
    axes.set_title(title, loc="left", color=COLORS["ink"], weight="bold")
    axes.set_xlabel("epoch", color=COLORS["muted"])
    axes.set_ylabel(METRICS[metric][1], color=COLORS["muted"], labelpad=6, rotation_mode="anchor")
    axes.tick_params(length=0, pad=6, labelcolor=COLORS["muted"])
    axes.grid(axis="y", color=COLORS["rule"], clip_on=False)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def save_confusion(path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> None:
    """Plot the confusion matrix.

    Of more than ``MAX_NUMBERED`` classes, the cells have no numbers, and colors on a logarithmic scale; of more than
    ``MAX_NAMED``, there are no names; of more than ``MAX_CELLS``, neighboring classes share a cell.

    Args:
        path: the PNG file to write.
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted classes.
        class_names: one name per class.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    num_classes = len(class_names)
    counts = confusion_counts(labels, predictions, num_classes)
    merged = -(-num_classes // MAX_CELLS)
    cell = next((inches for most, inches in CELL_SIZES.items() if num_classes <= most), 8 / num_classes)
    size = max(5.0, cell * num_classes + 2)
    with style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        figure = Figure(figsize=(size, size))
        axes = figure.subplots()
        if num_classes <= MAX_NUMBERED:
            _draw_numbers(axes, counts.toarray())
        else:
            _draw_colors(axes, counts, merged)
        if num_classes <= MAX_NAMED:
            text = {"parse_math": False, "fontsize": min(10, 60 * cell)}  # names may contain anything
            turned = {"rotation": 45 if num_classes <= MAX_NUMBERED else 90, "rotation_mode": "anchor"}
            axes.set_xticks(range(num_classes), class_names, ha="right", va="center", **turned, **text)
            axes.set_yticks(range(num_classes), class_names, **text)
        axes.set_title(f"{counts.trace():,} of {counts.sum():,} test images correctly classified")
        axes.set_xlabel("predicted class" if merged == 1 else f"predicted class, {merged} in a cell")
        axes.set_ylabel("true class")
        figure.savefig(path, dpi=120, bbox_inches="tight")  # room for names of any length


def _draw_numbers(axes: "Axes", counts: np.ndarray) -> None:
    """Draw the cells of a confusion matrix with numbers; of many classes, without zeros, to see the mistakes."""
    from sklearn.metrics import ConfusionMatrixDisplay

    texts = ConfusionMatrixDisplay(counts).plot(ax=axes, cmap="Blues", colorbar=False, values_format="d").text_
    for text in texts[counts == 0] if len(counts) > FEW_CLASSES else ():
        text.remove()


def _draw_colors(axes: "Axes", counts: csr_array, merged: int) -> None:
    """Draw the cells of a confusion matrix without numbers, each of which adds up ``merged`` neighboring classes."""
    cells = counts.tocoo()
    num_cells = -(-counts.shape[0] // merged)
    coords = tuple(places // merged for places in cells.coords)
    values = coo_array((cells.data, coords), (num_cells, num_cells)).toarray()
    end = merged * num_cells - 0.5
    # The logarithm, so that a single mistake can be seen.
    axes.imshow(np.log1p(values), cmap="Blues", extent=(-0.5, end, end, -0.5))
