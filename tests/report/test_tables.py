import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from cnn_jax.report.tables import class_table, confused_pairs, format_metric, metrics_by_split
from cnn_jax.training.history import EpochRecord

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
PREDICTIONS = np.array([0, 1, 1, 1, 1, 2, 0, 2, 2])
NAMES = ("cat", "dog", "yak")


def test_class_table_agrees_with_scikit_learn():
    rows = {line.split()[0]: line.split()[1:] for line in class_table(LABELS, PREDICTIONS, NAMES).splitlines() if line}
    expected = np.transpose(precision_recall_fscore_support(LABELS, PREDICTIONS))
    for name, figures in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose([float(x) for x in rows[name]], figures, atol=5e-5)
    assert rows["cat"] == ["0.5000", "0.3333", "0.4000", "3"]  # 1 of 2 predicted, 1 of 3 true


def test_class_without_examples():
    assert "owl" in class_table(LABELS, PREDICTIONS, (*NAMES, "owl"))


def test_confused_pairs_in_descending_order():
    assert confused_pairs(LABELS, PREDICTIONS, NAMES).splitlines() == [
        "most confused:",
        "  cat predicted as dog: 2 of 3",
        "  yak predicted as cat: 1 of 4",
    ]
    assert confused_pairs(LABELS, PREDICTIONS, NAMES, most=1).splitlines()[1:] == ["  cat predicted as dog: 2 of 3"]


def test_no_confused_pairs():
    assert confused_pairs(LABELS, LABELS, NAMES) == "most confused: none"


def test_control_characters_in_names_are_escaped():
    names = ("\x1b[31mcat", "d\nog", "y\u202eak")
    table, pairs = class_table(LABELS, PREDICTIONS, names), confused_pairs(LABELS, PREDICTIONS, names)
    assert all(line.isprintable() for line in (table + pairs).split("\n"))
    for text in (r"\x1b[31mcat ", r"d\nog ", r"y\u202eak "):
        assert text in table
    assert pairs.splitlines()[1:] == [
        r"  \x1b[31mcat predicted as d\nog: 2 of 3",
        r"  y\u202eak predicted as \x1b[31mcat: 1 of 4",
    ]


def test_metrics_of_the_splits_that_a_record_has():
    record = EpochRecord(0, 15, 900, 30.0, 0.6, None, None, 1.0, 1437.0, validation_loss=1.5, validation_accuracy=0.7)
    train, validation = {"loss": 2.0, "accuracy": 0.6}, {"loss": 1.5, "accuracy": 0.7}
    assert metrics_by_split(record, 15) == {"train": train, "validation": validation}
    record = EpochRecord(0, 15, 900, 30.0, 0.6, 1.5, 0.7, 1.0, 1437.0)
    assert metrics_by_split(record, 15) == {"train": train, "test": validation}


def test_format_metric():
    values = (0.12345, 99_999.0, 123_456.0, float("nan"), float("inf"))
    assert [format_metric(value) for value in values] == ["0.1235", "99999.0000", "1.23e+05", *2 * ["not finite"]]
    assert format_metric(0.126, 2) == "0.13"
