"""Metrics as text."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from sklearn.metrics import classification_report, precision_recall_fscore_support

from cnn_jax.errors import printable
from cnn_jax.training.history import EpochRecord


def class_table(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> str:
    """Precision, recall, F1 and support of each class, and their averages.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted classes.
        class_names: one name per class, printed with control characters escaped.
    """
    names = [printable(name) for name in class_names]
    return classification_report(
        labels, predictions, labels=range(len(names)), target_names=names, digits=4, zero_division=0
    )


def class_scores(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """The numbers of ``class_table``, as values that can be converted to JSON.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted classes.
        class_names: one name per class.

    Returns:
        ``classes``, a list of ``name``, ``precision``, ``recall``, ``f1`` and ``support`` of each class; and
        ``averages``, the first three numbers of the ``macro`` and ``weighted`` average.
    """
    indices = range(len(class_names))
    score = functools.partial(precision_recall_fscore_support, labels, predictions, labels=indices, zero_division=0)
    metrics = ("precision", "recall", "f1")
    return {
        "classes": [
            {"name": name, **dict(zip((*metrics, "support"), row, strict=True))}
            for name, *row in zip(class_names, *(column.tolist() for column in score()), strict=True)
        ],
        "averages": {
            kind: dict(zip(metrics, map(float, score(average=kind)[:3]), strict=True)) for kind in ("macro", "weighted")
        },
    }


def confusion_counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> csr_array:
    """The confusion matrix, int64 ``[classes, classes]`` by true and predicted class.

    It is sparse: the number of entries that are not zero is at most that of the examples, however many classes there
    are.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted classes.
        num_classes: the number of classes.
    """
    counts = coo_array((np.ones(len(labels), np.int64), (labels, predictions)), (num_classes, num_classes))
    return counts.tocsr()  # adds up


def confused_pairs(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], most: int = 5) -> str:
    """The most frequently confused pairs of classes, one per line, in descending order.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted classes.
        class_names: one name per class, printed with control characters escaped.
        most: the maximum number of pairs.
    """
    counts = confusion_counts(labels, predictions, len(class_names))
    supports = counts.sum(axis=1)
    names = [printable(name) for name in class_names]
    lines = [
        f"  {names[true]} predicted as {names[predicted]}: {times} of {supports[true]}"
        for true, predicted, times in most_confused(counts, most)
    ]
    return "\n".join(["most confused:", *lines]) if lines else "most confused: none"


def most_confused(counts: csr_array, most: int) -> list[tuple[int, int, int]]:
    """The largest off-diagonal entries of a confusion matrix, as (true class, predicted class, count).

    Args:
        counts: the confusion matrix.
        most: the maximum number of entries; zeros are omitted.
    """
    cells = counts.tocoo()
    true, predicted = cells.coords
    order = np.lexsort((predicted, true, -cells.data))
    order = order[true[order] != predicted[order]][:most]
    return np.transpose([true[order], predicted[order], cells.data[order]]).tolist()


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord:
    """The epoch with the highest accuracy on the validation split, or on the test split without one; the last if equal.

    Args:
        history: at least one epoch.
    """
    return max(history, key=lambda record: (record.selection_accuracy, record.epoch))


def metrics_by_split(record: EpochRecord, steps_per_epoch: int) -> dict[str, dict[str, float]]:
    """The loss and accuracy of an epoch on each split that has them: train, then validation or test.

    Args:
        record: the epoch.
        steps_per_epoch: the number of steps to average the training loss over.
    """
    splits = {
        "train": (record.loss / steps_per_epoch, record.train_accuracy),
        "validation": (record.validation_loss, record.validation_accuracy),
        "test": (record.test_loss, record.test_accuracy),
    }
    return {name: {"loss": loss, "accuracy": acc} for name, (loss, acc) in splits.items() if acc is not None}


def format_metric(value: float, digits: int = 4) -> str:
    """A number with a fixed number of decimal places, or in scientific notation if it is large."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}f}" if value < 1e5 else f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """A duration in seconds, or in minutes or hours if it is long."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 100:
        return f"{seconds:.2f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def format_setting(value: Any) -> str:
    """The value of a setting as on the command line: none, on, off, or its text."""
    match value:
        case None:
            return "none"
        case bool():
            return "on" if value else "off"
        case tuple():
            return " ".join(map(str, value))
        case _:
            return str(value)


def finite(value: Any) -> Any:
    """The same value with None instead of numbers that JSON does not have."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: finite(item) for name, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value
