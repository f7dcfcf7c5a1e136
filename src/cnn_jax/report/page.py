"""The page of a run: one file that any browser opens, and that asks for no other."""

import base64
import bisect
import dataclasses
import functools
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.report.tables import most_confused
from cnn_jax.training.history import EpochRecord

MAX_CLASSES = 100
"""Of more, nobody could read the confusion matrix, and it would make up most of the file."""

MAX_PAIRS = 8
"""Pairs of classes named as the most often confused."""

MAX_PICTURES = 24
"""Test images shown of those classified wrongly."""

PICTURE_SIDE = 96
"""Pixels of the longer side of a picture: two dozen in colour stay below a megabyte even if they are noise."""

PIXELATED_BELOW = 64
"""Pixels: the pictures of a shorter longer side are enlarged into squares, and not blurred."""

MAX_MARKERS = 30
"""Epochs that have room for a mark each on a curve."""

RIGHT_SHADES = (0.5, 0.8, 0.9, 0.95)
"""Where a class's share of images classified rightly takes the next darker of five shades."""

WRONG_SHADES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Where a class's share of images taken for one other class takes the next darker of six shades."""

PLOT_HEIGHT = 220
"""CSS pixels, as in the template's style sheet."""

LABEL_HEIGHT = 18
"""CSS pixels from a curve's label to the next."""

BACKENDS = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}
"""jax's names of kinds of devices, and how they are written."""


@dataclass(frozen=True)
class Tick:
    """A place on an axis, as a fraction of its length from the left or the top, and what stands there."""

    place: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A series of values, one for each epoch.

    Attributes:
        name: which also is that of its colour in the style sheet.
        path: its points as of SVG path data, in a square of side 100.
        marks: what each says, and where it is, as fractions from the left and from the top.
        last: the last value, as text.
        label_y: where that is written, as a fraction from the top: beside the curve's end, and clear of other labels.
    """

    name: str
    path: str
    marks: list[tuple[str, float, float]]
    last: str
    label_y: float


@dataclass(frozen=True)
class Chart:
    """Curves over the epochs, on axes with round numbers.

    Attributes:
        title: what the values are.
        unit: what they are measured in.
        x_ticks: epochs.
        y_ticks: values.
        end: where the last epoch is, as a fraction from the left.
        curves: all that are drawn.
    """

    title: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    end: float
    curves: list[Curve]


@dataclass(frozen=True)
class Picture:
    """A test image classified wrongly.

    Attributes:
        index: of the test example.
        source: the image as a PNG in a ``data:`` URL.
        label: the true class's name.
        prediction: the predicted class's name.
        probability: that the network gave the predicted class, as text.
    """

    index: int
    source: str
    label: str
    prediction: str
    probability: str


def save_page(
    path: Path,
    *,
    config: Config,
    history: Sequence[EpochRecord],
    steps_per_epoch: int,
    dataset: Dataset,
    logits: np.ndarray,
    summary: Mapping[str, Any],
) -> None:
    """Write what a run is and came to as a page of HTML that makes no request.

    Args:
        path: where to write it.
        config: the run's settings.
        history: at least one epoch.
        steps_per_epoch: over which a training loss is averaged.
        dataset: what the network was trained and tested on.
        logits: float ``[N, classes]``, the network's answers on the test examples.
        summary: as in ``summary.json``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from sklearn.metrics import confusion_matrix

    environment = Environment(
        loader=PackageLoader("cnn_jax", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "seconds": _seconds, "percent": _percent}
    labels, names = dataset.test.labels, dataset.class_names
    predictions = np.argmax(logits, axis=-1)
    counts = confusion_matrix(labels, predictions, labels=range(len(names)))
    html = environment.get_template("page.html.j2").render(
        config=config,
        settings=_settings(config),
        history=history,
        steps_per_epoch=steps_per_epoch,
        best=max(history, key=lambda record: (record.test_accuracy, record.epoch)),
        charts=_charts(history, steps_per_epoch),
        names=names,
        right=int(np.trace(counts)),
        total=len(labels),
        pairs=most_confused(counts, MAX_PAIRS),
        supports=counts.sum(axis=1).tolist(),
        matrix=_matrix(counts) if len(names) <= MAX_CLASSES else None,
        shades={
            kind: list(itertools.pairwise((0, *bounds, 1)))
            for kind, bounds in (("right", RIGHT_SHADES), ("wrong", WRONG_SHADES))
        },
        scores=_scores(labels, predictions, names),
        pictures=_most_wrong(dataset, logits),
        pixelated=max(dataset.image_shape[:2]) <= PIXELATED_BELOW,
        seconds=statistics.median(record.seconds for record in history),
        images_per_second=statistics.median(record.images_per_second for record in history),
        backend=BACKENDS.get(summary["backend"], summary["backend"]),
        summary=summary,
    )
    # The settings hold paths, whose names need not be text.
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")


def _figure(value: float, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _settings(config: Config) -> list[tuple[str, str, bool]]:
    """Each setting's name and value, and whether it differs from the default."""
    settings = []
    for field in dataclasses.fields(config):
        match value := getattr(config, field.name):
            case None:
                text = "none"
            case bool():
                text = "on" if value else "off"
            case tuple():
                text = " ".join(map(str, value))
            case _:
                text = str(value)
        settings.append((field.name, text, value != field.default))
    return settings


def _charts(history: Sequence[EpochRecord], steps_per_epoch: int) -> list[Chart]:
    loss = {
        "train": [record.loss / steps_per_epoch for record in history],
        "test": [record.test_loss for record in history],
    }
    accuracy = {
        "train": [record.train_accuracy for record in history],
        "test": [record.test_accuracy for record in history],
    }
    losses = [value for value in itertools.chain(*loss.values()) if math.isfinite(value)]
    shares = [*itertools.chain(*accuracy.values())]
    epochs = [record.epoch for record in history]
    return [
        _chart("Loss", "mean cross-entropy of an image", epochs, loss, 0, max(losses, default=0) or 1),
        # Not from 0, which most of a network's life is far above; and some air where all values are one.
        _chart(
            "Accuracy",
            "share of the images classified rightly",
            epochs,
            accuracy,
            max(0, min(shares) - 0.01),
            min(1, max(shares) + 0.01),
        ),
    ]


def _chart(
    title: str, unit: str, epochs: Sequence[int], series: Mapping[str, Sequence[float]], low: float, high: float
) -> Chart:
    """Draw series of values, by name, on an axis that reaches from ``low`` to ``high`` at least."""
    y_step = _round_step(high - low, most=5)
    bottom, top = math.floor(low / y_step), math.ceil(high / y_step)
    x_step = max(1, int(_round_step(epochs[-1] or 1, most=6)))

    def x(epoch: int) -> float:
        return epoch / epochs[-1] if epochs[-1] else 0.5

    def y(value: float) -> float:
        return (top - value / y_step) / (top - bottom) if math.isfinite(value) else 0.0

    label_ys = _apart([y(values[-1]) for values in series.values()])
    curves = []
    for (name, values), label_y in zip(series.items(), label_ys, strict=True):
        drawn = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
        marked = drawn if len(epochs) <= MAX_MARKERS else drawn[-1:]
        curves.append(
            Curve(
                name,
                path="L".join(f"{100 * x(epoch):.5g},{100 * y(value):.5g}" for epoch, value in drawn),
                marks=[(f"epoch {epoch}, {name}: {_figure(value)}", x(epoch), y(value)) for epoch, value in marked],
                last=_figure(values[-1]),
                label_y=label_y,
            )
        )
    return Chart(
        title,
        unit,
        x_ticks=[Tick(x(epoch), f"{epoch:,}") for epoch in epochs if epoch % x_step == 0],
        y_ticks=[Tick(y(n * y_step), _tick_text(n * y_step, y_step)) for n in range(bottom, top + 1)],
        end=x(epochs[-1]),
        curves=curves,
    )


def _round_step(span: float, most: int) -> float:
    """The least of 1, 2 and 5 times the powers of ten that a span holds at most so often."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power * most >= span)


def _tick_text(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step)))
    return f"{value:.{digits}f}" if digits <= 4 and step < 1e4 else f"{value:g}"


def _apart(places: Sequence[float]) -> list[float]:
    """Two places in a plot, moved so far apart that there is room for a label at each, and within the plot."""
    first, second = places
    push = max(0.0, LABEL_HEIGHT / PLOT_HEIGHT - abs(first - second)) / 2
    moved = [first - push, second + push] if first <= second else [first + push, second - push]
    beyond = max(0.0, max(moved) - 1)
    return [place - beyond for place in moved]


def _matrix(counts: np.ndarray) -> list[list[tuple[int, str]]]:
    """Rows of cells: the count, and its shade's name in the style sheet, none where there is nothing to shade."""

    def shade(true: int, taken: int, share: float) -> str:
        if not share:
            return ""
        if true == taken:
            return f"right-{bisect.bisect(RIGHT_SHADES, share) + 1}"
        return f"wrong-{bisect.bisect(WRONG_SHADES, share) + 1}"

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return [
        [(int(count), shade(true, taken, shares[true, taken])) for taken, count in enumerate(row)]
        for true, row in enumerate(counts)
    ]


def _scores(labels: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, list[tuple[Any, ...]]]:
    """Name, precision, recall, F1 and support of the classes, and of their averages."""
    from sklearn.metrics import precision_recall_fscore_support

    score = functools.partial(
        precision_recall_fscore_support, labels, predictions, labels=range(len(names)), zero_division=0
    )
    return {
        "classes": [(*row, int(support)) for *row, support in zip(names, *score(), strict=True)],
        "averages": [(f"{kind} average", *score(average=kind)[:3], len(labels)) for kind in ("macro", "weighted")],
    }


def _most_wrong(dataset: Dataset, logits: np.ndarray) -> list[Picture]:
    """The test images classified wrongly with the greatest probability, that first."""
    labels, names = dataset.test.labels, dataset.class_names
    predictions = np.argmax(logits, axis=-1)
    wrong = np.flatnonzero(predictions != labels)
    answers = np.nan_to_num(logits[wrong]).astype(np.float64)  # of infinite ones the largest finite number
    odds = np.exp(answers - answers.max(axis=-1, keepdims=True))
    probabilities = (odds / odds.sum(axis=-1, keepdims=True))[np.arange(len(wrong)), predictions[wrong]]
    surest = np.argsort(-probabilities, kind="stable")[:MAX_PICTURES]
    return [
        Picture(
            index=int(index),
            source=_data_url(dataset.test.images[index]),
            label=names[labels[index]],
            prediction=names[predictions[index]],
            probability="over 0.999" if probability >= 0.9995 else f"{probability:.3f}",
        )
        for index, probability in zip(wrong[surest], probabilities[surest], strict=True)
    ]


def _data_url(image: np.ndarray) -> str:
    """A uint8 image ``[H, W, C]`` as a PNG in a URL, scaled down where it is large."""
    from PIL import Image

    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
