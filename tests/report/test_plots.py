import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cnn_jax.report.plots import save_confusion, save_curves
from cnn_jax.training.history import EpochRecord

RECORD = EpochRecord(0, 15, 900, 30.0, 0.6, 1.5, 0.7, 1.0, 1437.0)


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures that were saved while the test ran."""
    figures = []
    savefig = Figure.savefig

    def spy(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def test_curves_show_the_history(tmp_path, saved_figures):
    history = [RECORD, dataclasses.replace(RECORD, epoch=1, loss=15.0, test_loss=0.9, test_accuracy=0.8)]
    save_curves(tmp_path / "curves.png", history, steps_per_epoch=15)
    loss, accuracy = saved_figures[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in loss.lines}
    assert curves == {"train": [2.0, 1.0], "test": [1.5, 0.9]}
    curves = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert curves == {"train": [0.6, 0.6], "test": [0.7, 0.8]}
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"


def test_confusion_names_classes_and_counts_cells(tmp_path, saved_figures):
    labels, predictions = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    save_confusion(tmp_path / "confusion.png", labels, predictions, ("Ankle boot", "Bag"))
    axes = saved_figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Ankle boot", "Bag"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Ankle boot", "Bag"]
    assert [text.get_text() for text in axes.texts] == ["1", "1", "1", "2"]
    assert axes.get_title() == "3 of 5 test examples classified rightly"


@pytest.mark.parametrize("num_classes", [2, 10, 150])
def test_nothing_is_cut_off_and_the_picture_can_be_opened(tmp_path, num_classes):
    labels = np.arange(num_classes)
    names = [f"a class with a long name, number {label}" for label in labels]
    save_confusion(tmp_path / "confusion.png", labels, labels, names)
    with Image.open(tmp_path / "confusion.png") as picture:
        image = np.asarray(picture.convert("L"))
    assert max(image.shape) <= 6000
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 255).all(), "ink on the border: something is cut off"


def test_classes_may_be_called_anything(tmp_path):
    save_confusion(tmp_path / "confusion.png", np.array([0, 1]), np.array([0, 1]), ("$\\frac$", "猫\U0001f408"))
    with Image.open(tmp_path / "confusion.png") as image:
        assert np.asarray(image.convert("L")).min() < 128, "nothing is drawn"
