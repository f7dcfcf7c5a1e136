"""The learning curves of the HTML report, and the metrics of every epoch."""

import dataclasses
import math
import re

import numpy as np
import pytest
from pages import RUNS, STEPS_PER_EPOCH, elements, make_history, make_run, section


def points(path):
    return np.array([point.split()[1:] for point in path.attributes["d"].splitlines()], float)


def scale(places, values):
    """A function from coordinates to values, which all ticks agree on."""
    slope, offset = np.polyfit(places, values, 1)
    np.testing.assert_allclose(slope * np.array(places) + offset, values, atol=1e-3 * np.ptp(values))
    return lambda places: slope * places + offset


@pytest.mark.parametrize(("num_epochs", "split"), [(2, "test"), (30, "validation"), (31, "test"), (300, "validation")])
def test_curves_show_the_history(page, num_epochs, split):
    history = make_history(num_epochs, split)
    train_loss = [record.loss / STEPS_PER_EPOCH for record in history]
    train_accuracy = [record.train_accuracy for record in history]
    loss = [getattr(record, f"{split}_loss") for record in history]
    accuracy = [getattr(record, f"{split}_accuracy") for record in history]
    loss_chart, accuracy_chart = page(make_run() | {"history": history}).all("svg", role="img")
    for chart, curves, title, unit in (
        (loss_chart, {"train": train_loss, split: loss}, "Loss", "mean cross-entropy"),
        (accuracy_chart, {"train": train_accuracy, split: accuracy}, "Accuracy", "fraction correctly classified"),
    ):
        texts = {anchor: [] for anchor in ("start", "middle", "end")}
        for text in chart.all("text"):
            texts[re.search("text-anchor: (\\w+)", text.attributes["style"])[1]].append(text)
        *x_ticks, x_label, y_label = texts["middle"]
        assert (x_label.text, y_label.text) == ("epoch", unit)
        ends = [f"{name} {values[-1]:.4f}" for name, values in curves.items()]
        assert [text.text for text in texts["start"]] == [*ends, title]
        assert len(x_ticks) <= 7
        x = scale([float(tick.attributes["x"]) for tick in x_ticks], [int(tick.text) for tick in x_ticks])
        lines = {color: [] for color in ("rule", *curves)}
        for path in chart.all("path"):
            if line := re.match(r"fill: none; stroke: var\(--(\w+)\)", path.attributes["style"]):
                lines[line[1]].append(points(path))
        y_ticks = [float(text.text) for text in texts["end"]]
        assert 2 <= len(y_ticks) <= 7
        y = scale([line[0, 1] for line in lines["rule"]], y_ticks)
        for name, values in curves.items():
            ((xs, ys),) = (line.T for line in lines[name])
            # Interpolated, because matplotlib omits points that make no visible difference.
            drawn = y(np.interp(range(num_epochs), x(xs), ys))
            np.testing.assert_allclose(drawn, values, atol=5e-3 * np.ptp(y_ticks))
            markers = [use for use in chart.all("use") if f"fill: var(--{name})" in use.attributes["style"]]
            marked = range(num_epochs) if num_epochs <= 30 else [num_epochs - 1]
            assert [use.text for use in markers] == [f"epoch {n}, {name}: {values[n]:.4f}" for n in marked]


@pytest.mark.parametrize("scale", [0, 1e-9, 1e-3, 3, 4e4, 1e30])
def test_charts_of_any_loss(page, scale):
    history = [dataclasses.replace(r, loss=r.loss * scale, test_loss=r.test_loss * scale) for r in make_history(3)]
    (chart, _) = page(make_run() | {"history": history}).all("svg", role="img")
    _, top, _, height = map(float, chart.attributes["viewbox"].split())
    for use in chart.all("use"):
        assert top < float(use.attributes["y"]) < height


def test_best_epoch_and_the_split_it_was_chosen_on(page):
    for split, sentence in {
        "test": "There is no validation split: the best checkpoint, epoch 1 with a test accuracy of 0.9500, "
        "was chosen on the test set.",
        "validation": "The best checkpoint, epoch 1 with a validation accuracy of 0.9500, "
        "was chosen on the validation set.",
    }.items():
        history = make_history(4, split)
        history[1] = dataclasses.replace(history[1], **{f"{split}_accuracy": 0.95})
        text = section(page(make_run() | {"history": history}), "curves").text
        assert sentence in text
        assert f"{split} metrics are computed at its end" in text
        assert ("no validation split" in text) == (split == "test")


def test_metrics_of_every_epoch(page):
    for split in ("test", "validation"):
        head, *_ = section(page(make_run() | {"history": make_history(4, split)}), "curves").all("table")[0].rows()
        name = split.capitalize()
        assert head[1:5] == ["Train loss", f"{name} loss", "Train accuracy", f"{name} accuracy"]
    rows = section(page(RUNS["ordinary"]), "curves").all("table")[0].rows()
    assert rows[1] == ["0", "1.4000", "1.1000", "0.6000", "0.6500", "0.25", "4,000"]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("epochs", [[1], [3], [0, 1, 2, 3]], ids=str)
def test_metrics_that_are_not_finite(page, value, epochs):
    """The test loss may overflow although the training loss does not."""
    history = make_history(4)
    for epoch in epochs:
        history[epoch] = dataclasses.replace(history[epoch], test_loss=value)
    run = make_run()
    logits = run["logits"].copy()
    logits[0], logits[3, 0], logits[6, 1] = math.nan, math.inf, -math.inf
    root = page(run | {"history": history, "logits": logits})
    shown = [node.text for node in elements(root) if node.tag != "style"]
    shown += [value for node in elements(root) if node.tag != "img" for value in node.attributes.values()]
    assert not [text for text in shown if re.search(r"\bnan\b|\binf\b", text, flags=re.IGNORECASE)]
    losses = [row[2] for row in section(root, "curves").all("table")[0].rows()[1:]]
    assert losses[epochs[0]] == ("3e+38" if value == 3e38 else "not finite")
