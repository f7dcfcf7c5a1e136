"""The confusion matrix of the HTML report, and the metrics by class."""

import numpy as np
from pages import RUNS, counts, make_run, section

from cnn_jax.data import Dataset, Split


def test_the_matrix_has_every_name_and_count(saved):
    run, root = saved
    table = section(root, "confusion").all("table")[0]
    names = list(run["dataset"].class_names)
    head, *rows = table.rows()
    assert head[1:] == names
    assert [name for name, *_ in rows] == names
    np.testing.assert_array_equal([[int(cell) for cell in row] for _, *row in rows], counts(run))


def test_axes_of_the_matrix_are_labeled(page):
    head = section(page(RUNS["ordinary"]), "confusion").all("table")[0].rows()[0]
    assert head[0].split() == ["true", "\N{DOWNWARDS ARROW}", "predicted", "\N{RIGHTWARDS ARROW}"]


def test_shades_follow_the_share_of_the_row(page):
    run = make_run()
    labels = np.repeat(np.arange(3, dtype=np.int32), [200, 40, 1])
    predictions = np.concatenate([np.repeat([0, 1, 2], [190, 9, 1]), np.repeat([0, 1], [8, 32]), [0]])
    split = Split(np.zeros((241, 8, 8, 1), np.uint8), labels)
    root = page(run | {"dataset": Dataset("squares", split, split, ("a", "b", "c")), "logits": np.eye(3)[predictions]})
    cells = section(root, "confusion").all("table", **{"class": "matrix"})[0].all("tbody")[0].all("td")
    assert [cell.attributes.get("class") for cell in cells] == [
        *["correct-5", "wrong-3", "wrong-1"],  # 95% correct; 4.5% and 0.5% wrong
        *["wrong-6", "correct-3", None],  # 20% wrong, 80% correct
        *["wrong-6", None, None],
    ]


def test_no_matrix_of_more_than_a_hundred_classes(page):
    root = page(make_run(101, 400))
    assert [table.attributes["class"] for table in section(root, "confusion").all("table")] == ["figures"]
    assert len(section(root, "classes").all("tr")) == 1 + 101 + 2


def test_most_frequent_mistakes(page):
    run = RUNS["ordinary"]
    rows = section(page(run), "confusion").all("table")[1].rows()[1:]
    mistakes = {(f"class {i}", f"class {j}"): n for (i, j), n in np.ndenumerate(counts(run)) if i != j and n}
    assert {(true, predicted): int(count) for true, predicted, count in rows} == mistakes
    assert [int(count) for _, _, count in rows] == sorted(mistakes.values(), reverse=True)


def test_metrics_by_class(saved):
    run, root = saved
    (table,) = section(root, "classes").all("table")
    rows = [[cell.strip() for cell in row] for row in table.rows()[1:]]
    matrix = counts(run)
    correct, predicted, support = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    expected = [
        correct / np.maximum(predicted, 1),
        correct / np.maximum(support, 1),
        2 * correct / np.maximum(predicted + support, 1),
    ]
    *classes, macro, weighted = rows
    assert [row[0] for row in classes] == list(run["dataset"].class_names)
    for column in (4, 5):  # the test and the training set are the same
        assert [int(row[column].replace(",", "")) for row in classes] == support.tolist()
    for shown, figures in zip(np.transpose([row[1:4] for row in classes]).astype(float), expected, strict=True):
        np.testing.assert_allclose(shown, figures, atol=5.1e-5)
    assert (macro[0], weighted[0]) == ("macro average", "weighted average")
    np.testing.assert_allclose([float(x) for x in macro[1:4]], np.mean(expected, axis=1), atol=5.1e-5)
    np.testing.assert_allclose(
        [float(x) for x in weighted[1:4]], np.average(expected, axis=1, weights=support), atol=5.1e-5
    )
