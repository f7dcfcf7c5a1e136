"""A network's answers, counted class by class, as text."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import classification_report, confusion_matrix

from cnn_jax.errors import printable


def class_table(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> str:
    """Precision, recall, F1 and support of each class, and their averages.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted ones.
        class_names: by class; printed as ``printable`` gives them.
    """
    names = [printable(name) for name in class_names]
    return classification_report(
        labels, predictions, labels=range(len(names)), target_names=names, digits=4, zero_division=0
    )


def confused_pairs(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], most: int = 5) -> str:
    """The pairs of classes most often taken one for the other, a line each, most often first.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted ones.
        class_names: by class; printed as ``printable`` gives them.
        most: lines.
    """
    counts = confusion_matrix(labels, predictions, labels=range(len(class_names)))
    supports = counts.sum(axis=1)
    names = [printable(name) for name in class_names]
    lines = [
        f"  {names[true]} taken for {names[predicted]}: {times} of {supports[true]}"
        for true, predicted, times in most_confused(counts, most)
    ]
    return "\n".join(["most confused:", *lines]) if lines else "most confused: none"


def most_confused(counts: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The largest numbers of a confusion matrix off its diagonal: true class, predicted class, and how often.

    Args:
        counts: int ``[classes, classes]``, by true and predicted class.
        most: pairs; those that never were confused are none.
    """
    mistakes = counts - np.diag(np.diag(counts))
    cells = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    pairs = np.transpose(np.unravel_index(cells, counts.shape)).tolist()
    return [(true, predicted, int(mistakes[true, predicted])) for true, predicted in pairs if mistakes[true, predicted]]
