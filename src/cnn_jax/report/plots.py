"""Pictures of a run."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnn_jax.training.history import EpochRecord


def save_curves(path: Path, history: Sequence[EpochRecord], steps_per_epoch: int) -> None:
    """Plot loss and accuracy over the epochs, on the training and the test examples.

    Args:
        path: where to write the picture, as PNG.
        history: at least one epoch.
        steps_per_epoch: over which a training loss is averaged.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [record.epoch for record in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    marker = "o" if len(epochs) < 30 else ""
    loss.plot(epochs, [record.loss / steps_per_epoch for record in history], marker=marker, label="train")
    loss.plot(epochs, [record.test_loss for record in history], marker=marker, label="test")
    loss.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy", ylim=(0, None))
    accuracy.plot(epochs, [record.train_accuracy for record in history], marker=marker, label="train")
    accuracy.plot(epochs, [record.test_accuracy for record in history], marker=marker, label="test")
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="fraction classified rightly")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def save_confusion(path: Path, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> None:
    """Plot how often each class was taken for each.

    Args:
        path: where to write the picture, as PNG.
        labels: int ``[N]``, the true classes.
        predictions: int ``[N]``, the predicted ones.
        class_names: by class.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    num_classes = len(class_names)
    # Cells that hold four digits; of very many classes only the colours can be seen.
    size = min(max(5.0, 0.7 * num_classes + 2), 40.0)
    figure = Figure(figsize=(size, size))
    axes = figure.subplots()
    counts = confusion_matrix(labels, predictions, labels=range(num_classes))
    ConfusionMatrixDisplay(counts, display_labels=class_names).plot(
        ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45, values_format="d", include_values=num_classes <= 100
    )
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a class may be called anything
    axes.set(
        title=f"{np.trace(counts)} of {counts.sum()} test examples classified rightly",
        xlabel="predicted class",
        ylabel="true class",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of scripts that the font lacks, boxes are drawn
        figure.savefig(path, dpi=120, bbox_inches="tight")  # however long the names are
