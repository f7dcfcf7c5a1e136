import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from cnn_jax.report.tables import class_table, confused_pairs

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
PREDICTIONS = np.array([0, 1, 1, 1, 1, 2, 0, 2, 2])
NAMES = ("cat", "dog", "yak")


def test_class_table_has_scikit_learns_figures():
    rows = {line.split()[0]: line.split()[1:] for line in class_table(LABELS, PREDICTIONS, NAMES).splitlines() if line}
    expected = np.transpose(precision_recall_fscore_support(LABELS, PREDICTIONS))
    for name, figures in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose([float(x) for x in rows[name]], figures, atol=5e-5)
    assert rows["cat"] == ["0.5000", "0.3333", "0.4000", "3"]  # by hand: 1 of 2 predicted, 1 of 3 true


def test_a_class_without_examples_is_no_error():
    assert "owl" in class_table(LABELS, PREDICTIONS, (*NAMES, "owl"))


def test_confused_pairs_most_often_first():
    assert confused_pairs(LABELS, PREDICTIONS, NAMES).splitlines() == [
        "most confused:",
        "  cat taken for dog: 2 of 3",
        "  yak taken for cat: 1 of 4",
    ]
    assert confused_pairs(LABELS, PREDICTIONS, NAMES, most=1).splitlines()[1:] == ["  cat taken for dog: 2 of 3"]


def test_no_confusion():
    assert confused_pairs(LABELS, LABELS, NAMES) == "most confused: none"


def test_names_are_printed_so_that_no_terminal_obeys_them():
    names = ("\x1b[31mcat", "d\nog", "y\u202eak")
    table, pairs = class_table(LABELS, PREDICTIONS, names), confused_pairs(LABELS, PREDICTIONS, names)
    assert all(line.isprintable() for line in (table + pairs).split("\n"))
    for text in (r"\x1b[31mcat ", r"d\nog ", r"y\u202eak "):
        assert text in table
    assert pairs.splitlines()[1:] == [
        r"  \x1b[31mcat taken for d\nog: 2 of 3",
        r"  y\u202eak taken for \x1b[31mcat: 1 of 4",
    ]
