"""The report of a run: a single HTML file that works offline."""

import base64
import bisect
import dataclasses
import datetime
import io
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.report.plots import METRICS, curves_svg
from cnn_jax.report.tables import (
    best_epoch,
    class_scores,
    confusion_counts,
    format_duration,
    format_setting,
    metrics_by_split,
    most_confused,
)
from cnn_jax.report.templates import render
from cnn_jax.training.evaluation import log_normalizers
from cnn_jax.training.history import EpochRecord

MAX_CLASSES = 100
"""The maximum number of classes to show a confusion matrix for: a larger one would dominate the file."""

MAX_PAIRS = 8
"""The maximum number of confused pairs of classes to list."""

MAX_PICTURES = 24
"""The maximum number of misclassified test images to show."""

ROWS_AT_A_TIME = 1000
"""The number of rows of logits to copy at a time: those of 10,000 classes take 40 MB."""

PICTURE_SIDE = 96
"""The maximum height and width of a picture in pixels: two dozen pictures of noise take less than a megabyte."""

PIXELATED_SIDE = 64
"""The maximum height and width in pixels of pictures that are enlarged without smoothing."""

CORRECT_SHADES = (0.5, 0.8, 0.9, 0.95)
"""The fractions of a row on the diagonal at which the next of five shades begins."""

WRONG_SHADES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""The fractions of a row off the diagonal at which the next of six shades begins."""


def save_page(
    path: Path,
    *,
    config: Config,
    history: Sequence[EpochRecord],
    steps_per_epoch: int,
    dataset: Dataset,
    logits: np.ndarray,
    test_loss: float,
    num_parameters: int,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of a run as an HTML file without scripts or external resources.

    Args:
        path: the file to write.
        config: the settings of the run.
        history: the epochs so far; without any, no curves and speeds are shown.
        steps_per_epoch: the number of steps to average the training loss over.
        dataset: the data that the network was tested on, with the network's classes. If it has another name than
            ``config.dataset``, its training examples are not mentioned.
        logits: float ``[N, classes]``, the network's output for the test examples.
        test_loss: their mean cross-entropy.
        num_parameters: the size of the network.
        summary: the content of ``summary.json``, from which the date, the hardware, the time that compilation took and
            the versions are shown; None if they are unknown.
    """
    predictions = np.argmax(logits, axis=-1)
    scores = class_scores(dataset.test.labels, predictions, dataset.class_names)
    render(
        path,
        "page.html.j2",
        config=config,
        history=history,
        dataset=dataset,
        names=dataset.class_names,
        trained_on=dataset.name == config.dataset,
        test_loss=test_loss,
        num_parameters=num_parameters,
        date=_date(summary["date"]) if summary else None,
        **_curves(history, steps_per_epoch),
        **_confusion(confusion_counts(dataset.test.labels, predictions, len(dataset.class_names))),
        **_classes(scores, dataset),
        **_mistakes(dataset, logits),
        **_details(config, history, dataset, num_parameters, summary),
    )


def _curves(history: Sequence[EpochRecord], steps_per_epoch: int) -> dict[str, Any]:
    """What the template needs for the learning curves: charts, the metrics of every epoch, the best."""
    from markupsafe import Markup

    return {
        "charts": [Markup(curves_svg(metric, history, steps_per_epoch)) for metric in METRICS if history],
        "metrics": [metrics_by_split(record, steps_per_epoch) for record in history],
        "best": best_epoch(history) if history else None,
    }


def _confusion(counts: csr_array) -> dict[str, Any]:
    """What the template needs for the confusion matrix: its cells and shades, its sums, its largest wrong entries."""
    return {
        "matrix": _matrix(counts.toarray()) if counts.shape[0] <= MAX_CLASSES else None,
        "shades": {
            kind: list(itertools.pairwise((0, *bounds, 1)))
            for kind, bounds in (("correct", CORRECT_SHADES), ("wrong", WRONG_SHADES))
        },
        "right": int(counts.trace()),
        "supports": counts.sum(axis=1).tolist(),
        "pairs": most_confused(counts, MAX_PAIRS),
    }


def _classes(scores: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """What the template needs for the metrics by class: these, and the number of training images of each."""
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    return {"scores": scores, "train_counts": counts.tolist()}


def _mistakes(dataset: Dataset, logits: np.ndarray) -> dict[str, Any]:
    """What the template needs for the most confident mistakes: pictures, and whether to enlarge them unsmoothed."""
    return {
        "pictures": _most_confident_mistakes(dataset, logits),
        "pixelated": max(dataset.image_shape[:2]) <= PIXELATED_SIDE,
    }


def _details(
    config: Config,
    history: Sequence[EpochRecord],
    dataset: Dataset,
    num_parameters: int,
    summary: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the template needs for the training details: the rows of each table."""
    return {
        "settings": _settings(config),
        "data_facts": _data_facts(config, dataset, num_parameters),
        "speed_facts": _speed_facts(history, summary),
        "versions": summary["versions"] if summary else {},
    }


def _date(text: str) -> str:
    """A date and time in ISO 8601 with its time zone, such as ``2026-11-24 10:38 UTC+01:00``."""
    return f"{datetime.datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}"


def _data_facts(config: Config, dataset: Dataset, num_parameters: int) -> dict[str, str]:
    height, width, channels = dataset.image_shape
    splits = dataset.splits if dataset.name == config.dataset else {"test": dataset.test}
    return {
        **{f"{name.capitalize()} images": f"{len(split):,}" for name, split in splits.items()},
        "Image size": f"{height} \N{MULTIPLICATION SIGN} {width} pixels",
        "Channels": {1: "1 (grayscale)", 3: "3 (color)"}.get(channels, str(channels)),
        "Classes": f"{len(dataset.class_names):,}",
        "Parameters": f"{num_parameters:,}",
    }


def _speed_facts(history: Sequence[EpochRecord], summary: Mapping[str, Any] | None) -> dict[str, str]:
    facts = {}
    if summary is not None:
        facts["Device"] = f"{summary['backend'].upper()}: {summary['device']}"
        facts["Number of devices"] = str(summary["device_count"])
        if summary["process_count"] > 1:
            facts["Number of processes"] = str(summary["process_count"])
        facts["CPU cores"] = str(summary["cpu_count"])
    if history:
        seconds = sum(record.seconds for record in history)
        waited = sum(record.input_wait_seconds for record in history)
        facts["Training, all epochs"] = format_duration(seconds)
        facts["Waiting for images"] = f"{format_duration(waited)}, {waited / (seconds or 1):.1%} of it"
        facts["Median epoch"] = format_duration(statistics.median(record.seconds for record in history))
        facts["Images per second"] = f"{statistics.median(record.images_per_second for record in history):,.0f}"
    if summary is not None:
        facts["Compilation"] = format_duration(summary["compile_seconds"])
    return facts


def _settings(config: Config) -> list[tuple[str, str, bool]]:
    """The name and value of each setting, and whether it differs from the default."""
    values = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return [(field.name, format_setting(value), value != field.default) for field, value in values]


def _matrix(counts: np.ndarray) -> list[list[tuple[int, str]]]:
    """The confusion matrix as rows of (count, CSS class), without a class where the count is 0."""

    def shade(true: int, predicted: int, fraction: float) -> str:
        if not fraction:
            return ""
        if true == predicted:
            return f"correct-{bisect.bisect(CORRECT_SHADES, fraction) + 1}"
        return f"wrong-{bisect.bisect(WRONG_SHADES, fraction) + 1}"

    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return [
        [(int(count), shade(true, predicted, fractions[true, predicted])) for predicted, count in enumerate(row)]
        for true, row in enumerate(counts)
    ]


def _most_confident_mistakes(dataset: Dataset, logits: np.ndarray) -> list[dict[str, Any]]:
    """The misclassified test images with the highest predicted probabilities, in descending order."""
    labels, names = dataset.test.labels, dataset.class_names
    predictions = np.argmax(logits, axis=-1)
    wrong = np.flatnonzero(predictions != labels)
    blocks = np.split(wrong, range(ROWS_AT_A_TIME, len(wrong), ROWS_AT_A_TIME))
    probabilities = np.concatenate([_confidences(logits[rows], predictions[rows]) for rows in blocks])
    order = np.argsort(-probabilities, kind="stable")[:MAX_PICTURES]
    return [
        {
            "index": index,
            "file": None if dataset.test.files is None else dataset.test.files[index],
            "source": _data_url(dataset.test.images[index]),
            "label": names[labels[index]],
            "prediction": names[predictions[index]],
            "probability": "over 0.999" if probability >= 0.9995 else f"{probability:.3f}",
        }
        for index, probability in zip(wrong[order], probabilities[order], strict=True)
    ]


def _confidences(logits: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """The probability of the predicted class of each row of logits, which are changed; float64 ``[N]``."""
    np.nan_to_num(logits, copy=False)  # infinity becomes the largest finite number
    chosen = logits[np.arange(len(logits)), predictions].astype(np.float64)
    return np.exp(chosen - log_normalizers(logits))


def _data_url(image: np.ndarray) -> str:
    """A uint8 image ``[H, W, C]`` as a PNG in a ``data:`` URL, scaled down if it is large."""
    from PIL import Image

    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
