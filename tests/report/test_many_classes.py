"""Tables and pictures of thousands of classes, whose confusion matrix would have as many entries as their square."""

import tracemalloc

import numpy as np
from sklearn.metrics import confusion_matrix

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.report.page import save_page
from cnn_jax.report.plots import MAX_CELLS, save_confusion
from cnn_jax.report.tables import confused_pairs, confusion_counts, most_confused

NUM_CLASSES = 40_000


def test_counts_are_scikit_learns():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 30, (2, 1000))
    counts = confusion_counts(labels, predictions, 30)
    expected = confusion_matrix(labels, predictions, labels=range(30))
    np.testing.assert_array_equal(counts.toarray(), expected)
    mistakes = expected - np.diag(np.diag(expected))
    pairs = most_confused(counts, 50)
    assert [count for *_, count in pairs] == np.sort(mistakes, axis=None)[::-1][:50].tolist()
    assert all(mistakes[true, predicted] == count for true, predicted, count in pairs)


def test_memory_does_not_grow_with_the_square_of_the_classes(tmp_path):
    labels = np.arange(NUM_CLASSES)
    predictions = np.where(labels % 2, labels, (labels + 1) % NUM_CLASSES)
    names = [str(label) for label in labels]
    tracemalloc.start()
    assert confused_pairs(labels, predictions, names).count("1 of 1") == 5
    save_confusion(tmp_path / "confusion.png", labels, predictions, names)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < NUM_CLASSES**2 / 8  # a matrix of bytes would take eight times as much


def test_cells_of_merged_classes_add_up(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "imshow", lambda axes, cells, **options: drawn.append(cells))
    labels = np.repeat(np.arange(2 * MAX_CELLS + 2), 3)
    save_confusion(tmp_path / "confusion.png", labels, labels, list(map(str, range(2 * MAX_CELLS + 2))))
    cells = np.expm1(drawn[0])
    assert cells.shape == (334, 334)
    np.testing.assert_allclose(cells, 9 * np.eye(334), rtol=1e-6)  # three classes with three images each


def test_page_takes_little_memory_besides_the_logits(tmp_path):
    labels = np.arange(4000, dtype=np.int32)
    split = (np.zeros((4000, 2, 2), np.uint8), labels)
    dataset = Dataset.from_arrays(split, split, class_names=list(map(str, labels)))
    logits = np.zeros((4000, 4000), np.float32)
    options = {"config": Config(), "history": (), "steps_per_epoch": 1, "test_loss": 1.0, "num_parameters": 1}
    tracemalloc.start()
    save_page(tmp_path / "report.html", dataset=dataset, logits=logits, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * logits.nbytes
