"""Learning curves and the confusion matrix, drawn with matplotlib."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnn_jax.report.tables import format_metric, metrics_by_split
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

MAX_MARKERS = 30
"""The maximum number of epochs for which each epoch has a marker."""

MANY_CLASSES = 20
"""The maximum number of classes for which the confusion matrix has large cells, and zeros."""

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
    from matplotlib import style
    from matplotlib.figure import Figure

    # This font affects the layout only: the page's style sheet sets another.
    settings = {"svg.fonttype": "none", "svg.hashsalt": metric, "font.sans-serif": ["DejaVu Sans"]}
    with style.context(["default", settings]):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.subplots()
        tooltips = iter(_draw_curves(axes, metric, history, steps_per_epoch))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = SVG_OVERHEAD.sub("", file.getvalue())
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r"(<use [^>]*)/>", lambda use: f"{use[1]}><title>{next(tooltips)}</title></use>", svg)
    label = f"{METRICS[metric][0]} by epoch, at the end: {', '.join(text.get_text() for text in axes.texts)}"
    root = rf'<svg \1 role="img" aria-label="{label}">'
    return re.sub(r'.*<svg [^>]*(viewBox="[^"]*")[^>]*>', root, svg, count=1, flags=re.DOTALL)


def _draw_curves(axes: "Axes", metric: str, history: Sequence[EpochRecord], steps_per_epoch: int) -> list[str]:
    """Draw a curve for each split, labeled with its last value; return a tooltip for each marker, in drawing order."""
    from matplotlib.ticker import MaxNLocator

    splits = metrics_by_split(history[-1], steps_per_epoch)
    curves = {
        split: {record.epoch: metrics_by_split(record, steps_per_epoch)[split][metric] for record in history}
        for split in splits
    }
    values = [value for curve in curves.values() for value in curve.values() if math.isfinite(value)]
    # Accuracies are compared near their top, which an axis from 0 would compress.
    low, high = (0, max(values, default=0) or 1) if metric == "loss" else (min(values) - 0.01, max(values) + 0.01)
    y_ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(max(0, low), high if metric == "loss" else min(1, high))
    last = history[-1].epoch
    x_ticks = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True).tick_values(0, last or 1)
    axes.set(ylim=(y_ticks[0], y_ticks[-1]), yticks=y_ticks)
    axes.set(xlim=(0, last) if last else (-1, 1), xticks=[tick for tick in x_ticks if 0 <= tick <= last])
    axes.set_title(METRICS[metric][0], loc="left", color=COLORS["ink"], weight="bold")
    axes.set_xlabel("epoch", color=COLORS["muted"])
    axes.set_ylabel(METRICS[metric][1], color=COLORS["muted"], labelpad=6, rotation_mode="anchor")
    axes.tick_params(length=0, pad=6, labelcolor=COLORS["muted"])
    axes.grid(axis="y", color=COLORS["rule"], clip_on=False)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)

    heights = axes.transLimits.transform([(last, curve[last]) for curve in curves.values()])[:, 1]
    heights = np.nan_to_num(heights, nan=1, posinf=1)
    for lower, upper in len(curves) * list(pairwise(np.argsort(heights))):
        overlap = max(0, LABEL_HEIGHT - heights[upper] + heights[lower])
        heights[lower] -= overlap / 2
        heights[upper] += overlap / 2
    tooltips = []
    for (split, curve), height in zip(curves.items(), heights, strict=True):
        finite = [(epoch, value) for epoch, value in curve.items() if math.isfinite(value)]
        marked = finite if len(history) <= MAX_MARKERS else finite[-1:]
        axes.plot(*np.reshape(finite, (-1, 2)).T, color=COLORS[split], clip_on=False)
        axes.plot(*np.reshape(marked, (-1, 2)).T, "o", color=COLORS[split], markersize=4, clip_on=False)
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
    return tooltips


def save_confusion(path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> None:
    """Plot the confusion matrix.

    Args:
        path: the PNG file to write.
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted classes.
        class_names: one name per class.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    num_classes = len(class_names)
    counts = confusion_matrix(labels, predictions, labels=range(num_classes))
    many = num_classes > MANY_CLASSES
    # Cells large enough for four digits, or for three of many classes; of very many, only the colors are visible.
    size = min(max(5.0, (0.4 if many else 0.7) * num_classes + 2), 40.0)
    with style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        figure = Figure(figsize=(size, size))
        axes = figure.subplots()
        display = ConfusionMatrixDisplay(counts, display_labels=class_names).plot(
            ax=axes,
            cmap="Blues",
            colorbar=False,
            xticks_rotation=45,
            values_format="d",
            include_values=num_classes <= 100,
        )
        if many and display.text_ is not None:
            for text in display.text_[counts == 0]:
                text.remove()  # so that the mistakes can be seen among them
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)  # class names may contain anything
        axes.set(
            title=f"{np.trace(counts):,} of {counts.sum():,} test images correctly classified",
            xlabel="predicted class",
            ylabel="true class",
        )
        figure.savefig(path, dpi=120, bbox_inches="tight")  # room for names of any length
