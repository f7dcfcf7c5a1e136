"""A network's answers, counted class by class, as text."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import classification_report, confusion_matrix


def class_table(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> str:
    """Precision, recall, F1 and support of each class, and their averages.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted ones.
        class_names: by class.
    """
    return classification_report(
        labels, predictions, labels=range(len(class_names)), target_names=class_names, digits=4, zero_division=0
    )


def confused_pairs(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], most: int = 5) -> str:
    """The pairs of classes most often taken one for the other, a line each, most often first.

    Args:
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted ones.
        class_names: by class.
        most: lines.
    """
    counts = confusion_matrix(labels, predictions, labels=range(len(class_names)))
    supports = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    lines = []
    for cell in np.argsort(-counts, axis=None, kind="stable")[:most]:
        true, predicted = np.unravel_index(cell, counts.shape)
        if times := counts[true, predicted]:
            lines.append(f"  {class_names[true]} taken for {class_names[predicted]}: {times} of {supports[true]}")
    return "\n".join(["most confused:", *lines]) if lines else "most confused: none"
