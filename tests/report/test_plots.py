import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cnn_jax.report.plots import curves_svg, save_confusion, save_curves
from cnn_jax.training.history import EpochRecord

RECORD = EpochRecord(0, 15, 900, 30.0, 0.6, 1.5, 0.7, 1.0, 1437.0)


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures saved during the test."""
    figures = []
    savefig = Figure.savefig

    def spy(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


@pytest.mark.parametrize("split", ["test", "validation"])
def test_curves_show_the_history(tmp_path, saved_figures, split):
    none = dict.fromkeys(("test_loss", "test_accuracy"))
    history = [
        dataclasses.replace(
            RECORD, epoch=n, loss=loss, **none | {f"{split}_loss": other, f"{split}_accuracy": accuracy}
        )
        for n, (loss, other, accuracy) in enumerate([(30.0, 1.5, 0.7), (15.0, 0.9, 0.8)])
    ]
    save_curves(tmp_path / "curves.png", history, steps_per_epoch=15)
    loss, accuracy = saved_figures[0].axes
    for axes, title, label, curves in (
        (loss, "Loss", "mean cross-entropy", {"train": [2.0, 1.0], split: [1.5, 0.9]}),
        (accuracy, "Accuracy", "fraction correctly classified", {"train": [0.6, 0.6], split: [0.7, 0.8]}),
    ):
        assert (axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()) == (title, "epoch", label)
        assert [list(line.get_ydata()) for line in axes.lines[::2]] == list(curves.values())
        assert [text.get_text() for text in axes.texts] == [f"{name} {ys[-1]:.4f}" for name, ys in curves.items()]
        # A split has the same color in every chart.
        assert [line.get_color() for line in axes.lines] == [line.get_color() for line in loss.lines]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"


def test_labels_of_similar_values_do_not_overlap(tmp_path, saved_figures):
    for value in (0.0, 1.5):
        save_curves(tmp_path / "curves.png", [dataclasses.replace(RECORD, loss=value, test_loss=value)], 1)
        figure = saved_figures.pop()
        first, second = (text.get_window_extent() for text in figure.axes[0].texts)
        assert not first.overlaps(second)


def test_svg_does_not_depend_on_the_users_style():
    from matplotlib import rc_context

    expected = curves_svg("loss", [RECORD], 15)
    with rc_context({"lines.linewidth": 9, "font.size": 20, "text.color": "red", "svg.fonttype": "path"}):
        assert curves_svg("loss", [RECORD], 15) == expected


def test_confusion_names_classes_and_counts_cells(tmp_path, saved_figures):
    labels, predictions = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    save_confusion(tmp_path / "confusion.png", labels, predictions, ("Ankle boot", "Bag"))
    axes = saved_figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Ankle boot", "Bag"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Ankle boot", "Bag"]
    assert [text.get_text() for text in axes.texts] == ["1", "1", "1", "2"]
    assert axes.get_title() == "3 of 5 test images correctly classified"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_confusion_of_many_classes_has_no_zeros(tmp_path, saved_figures):
    labels = np.arange(50).repeat(3)
    predictions = labels.copy()
    predictions[:2] = 7, 8
    save_confusion(tmp_path / "confusion.png", labels, predictions, [f"class {n}" for n in range(50)])
    texts = saved_figures[0].axes[0].texts
    assert [text.get_text() for text in texts] == ["1", "1", "1", *49 * ["3"]]
    assert [text.get_position() for text in texts[:3]] == [(0, 0), (7, 0), (8, 0)]


@pytest.mark.parametrize("num_classes", [51, 200, 201, 1000])
def test_confusion_of_more_classes_is_one_small_picture(tmp_path, saved_figures, num_classes):
    """A text for each cell, or a cell large enough for it, would take seconds and gigabytes."""
    labels = np.arange(num_classes)
    predictions = labels.copy()
    predictions[3] = 9
    save_confusion(tmp_path / "confusion.png", labels, predictions, [f"class {n}" for n in labels])
    axes = saved_figures[0].axes[0]
    assert len(axes.texts) == 0
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (names == [f"class {n}" for n in labels]) == (num_classes <= 200)
    assert axes.images[0].get_array()[3 * 500 // max(500, num_classes), 9 * 500 // max(500, num_classes)] > 0
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) <= 2700


@pytest.mark.parametrize("num_classes", [2, 10, 150])
def test_nothing_is_cut_off_and_the_picture_can_be_opened(tmp_path, num_classes):
    labels = np.arange(num_classes)
    names = [f"a class with a long name, number {label}" for label in labels]
    save_confusion(tmp_path / "confusion.png", labels, labels, names)
    with Image.open(tmp_path / "confusion.png") as picture:
        image = np.asarray(picture.convert("L"))
    assert max(image.shape) <= 6000
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 255).all(), "ink at the border: something is cut off"


def test_class_names_may_contain_anything(tmp_path):
    save_confusion(tmp_path / "confusion.png", np.array([0, 1]), np.array([0, 1]), ("$\\frac$", "猫\U0001f408"))
    with Image.open(tmp_path / "confusion.png") as image:
        assert np.asarray(image.convert("L")).min() < 128, "nothing is drawn"
