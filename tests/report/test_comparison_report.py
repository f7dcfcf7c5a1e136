"""A comparison of runs as text, as JSON and as a page."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from comparisons import COMPARISONS, make_run
from pages import STEPS_PER_EPOCH, elements, read, section
from test_page import luminance
from test_page_curves import points, scale

from cnn_jax.report.comparison import as_text, save_page, to_json
from cnn_jax.report.plots import RUN_COLORS, run_line
from cnn_jax.training.comparison import ImageResults, compare


@pytest.fixture(params=COMPARISONS)
def saved(request, tmp_path):
    """A comparison and its parsed page."""
    comparison = compare(COMPARISONS[request.param])
    save_page(tmp_path / "comparison.html", comparison)
    return comparison, read(tmp_path / "comparison.html")


def rows_of(text, title):
    """The rows of a table in the text, split at two or more spaces."""
    (table,) = [part for part in text.split("\n\n") if part.startswith(title)]
    return {name: row for name, *row in (re.split(r" {2,}", line) for line in table.splitlines())}


# Text


def test_tables():
    text = as_text(compare(COMPARISONS["two"]))
    assert rows_of(text, "differences") == {"differences": ["run0", "run1"], "seed": ["0", "1"]}
    accuracies = [f"{run.test_accuracy:.4f}" for run in COMPARISONS["two"]]
    assert rows_of(text, "results") == {
        "results": ["run0", "run1"],
        "test accuracy": accuracies,
        "test loss": ["0.4250", "0.4250"],
        "best epoch": ["3", "3"],
        "its accuracy": 2 * ["0.8375 (test)"],
        "epochs": ["4", "4"],
        "steps": ["60", "60"],
        "parameters": ["32,998", "32,998"],
        "training time": ["2.50 s", "2.50 s"],
        "images per second": ["1,667", "1,667"],
        "compilation": ["3.25 s", "3.25 s"],
        "device": 2 * ["CPU: AMD EPYC 7B13"],
        "number of devices": ["2", "2"],
    }


def test_the_test_of_two_runs():
    comparison = compare(COMPARISONS["two"])
    counts = comparison.pairs[0].counts
    first, second = (run.test_accuracy for run in comparison.runs)
    low, high = counts.interval
    assert as_text(comparison).split("\n\n")[2].splitlines() == [
        "run0 and run1: 500 test images of both",
        f"  accuracy {first:.4f} and {second:.4f}: difference {first - second:+.4f} ({low:+.4f} to {high:+.4f})",
        f"  only the first is right: {counts.only_first}, only the second: {counts.only_second}",
        f"  p = {counts.p_value:.3g}",
    ]


def test_several_tests_are_corrected():
    comparison = compare([make_run(n) for n in range(3)])
    text = as_text(comparison)
    for pair in comparison.pairs:
        p, adjusted = pair.counts.p_value, pair.adjusted_p_value
        assert f"  p = {p:.3g}, with Holm's correction for 3 tests {adjusted:.3g}\n" in text


def test_what_is_unknown_or_not_compared():
    text = as_text(compare(COMPARISONS["different"]))
    assert "run3 was not evaluated: cannot read <b>/data</b>: No such file\n" in text
    assert "run0 and run1: not compared image by image, because their classes differ\n" in text
    assert "run0 and run3" not in text
    results, differences = rows_of(text, "results"), rows_of(text, "differences")
    assert results["test accuracy"][3] == results["device"][2] == results["best epoch"][2] == "-"
    assert results["epochs"] == ["4", "7", "0 of 4", "4"]
    assert results["validation accuracy"] == ["-", "0.8643", "-", "-"]
    assert differences["class_names"] == ["2, with dog", "2, with yak", "2, with dog", "2, with dog"]
    assert differences["data_sha256"][:2] == ["5e5e5e5e5e5e", "6f6f6f6f6f6f"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["abcdef", "abc"], ["6, with d, e, f", "3"]),
        (["abcdefg", "abc"], ["7, with d, e, f, ...", "3"]),
        (["ab", "ba"], 2 * ["2, in another order"]),
    ],
)
def test_classes_that_differ(names, expected, tmp_path):
    save_page(tmp_path / "page.html", compare([make_run(n, class_names=tuple(name)) for n, name in enumerate(names)]))
    rows = section(read(tmp_path / "page.html"), "differences").rows()
    assert rows[-1] == ["class_names", *expected]


def test_nothing_differs():
    run = make_run(0)
    text = as_text(compare([run, dataclasses.replace(run, name="copy")]))
    assert text.startswith("no differences in settings and data\n\nresults")
    assert "  p = 1\n" in text


@pytest.mark.parametrize("name", COMPARISONS)
def test_lines_fit_a_terminal(name):
    text = as_text(compare(COMPARISONS[name]), 80)
    long = [line for line in text.splitlines() if len(line) > 80 and "and" not in line]
    assert long == []
    assert all(line == line.rstrip() for line in text.splitlines())
    for run in COMPARISONS[name]:
        assert f"{run.test_accuracy or 0:.4f}" in text or run.test_accuracy is None


def test_names_are_printable():
    runs = [make_run(0, "a\x1b[31m\nb"), make_run(1, "c\u202e[bold]")]
    text = as_text(compare(runs))
    assert all(line.isprintable() for line in text.splitlines())
    assert rows_of(text, "results")["results"] == [r"a\x1b[31m\nb", r"c\u202e[bold]"]
    assert r"a\x1b[31m\nb and c\u202e[bold]: 500 test images of both" in text


def test_colors_are_not_used_even_if_they_are_forced(monkeypatch):
    expected = as_text(compare(COMPARISONS["two"]))
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"}.items():
        monkeypatch.setenv(name, value)
    assert as_text(compare(COMPARISONS["two"])) == expected


# JSON


@pytest.mark.parametrize("name", COMPARISONS)
def test_json_has_every_run_and_pair(name):
    comparison = compare(COMPARISONS[name])
    values = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    assert values.keys() == {"runs", "differences", "pairs"}
    for value, run in zip(values["runs"], comparison.runs, strict=True):
        assert value["name"] == run.name
        assert (value["test_accuracy"], value["step"]) == (run.test_accuracy, run.step)
        assert value["config"]["seed"] == run.config.seed
        assert len(value["history"]) == value["epochs"] == len(run.history)
        assert (value["not_evaluated"] is None) == isinstance(run.images, ImageResults)
    for value, pair in zip(values["pairs"], comparison.pairs, strict=True):
        assert (value["first"], value["second"]) == (pair.first, pair.second)
        if isinstance(pair.counts, str):
            assert value["not_compared"] == pair.counts
        else:
            assert value["examples"] == value["both"] + value["only_first"] + value["only_second"] + value["neither"]
            assert value["p_value"] == pair.counts.p_value <= value["adjusted_p_value"] == pair.adjusted_p_value
            assert value["interval"] == list(pair.counts.interval)
            assert value["difference"] == pytest.approx(value["accuracies"][0] - value["accuracies"][1])
    assert values["differences"]["seed" if name != "nasty" else "class_names"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_null(value, tmp_path):
    run = make_run(0, test_loss=value)
    history = [dataclasses.replace(record, loss=value, test_loss=value, seconds=value) for record in run.history]
    run = dataclasses.replace(run, history=tuple(history))
    comparison = compare([run, make_run(1)])
    first = json.loads(json.dumps(to_json(comparison), allow_nan=False))["runs"][0]
    assert (first["test_loss"], first["history"][0]["loss"], first["train_seconds"]) == (None, None, None)
    assert rows_of(as_text(comparison), "results")["test loss"] == ["not finite", "0.4250"]
    save_page(tmp_path / "comparison.html", comparison)
    root = read(tmp_path / "comparison.html")
    shown = [node.text for node in elements(root) if node.tag != "style"]
    assert not [text for text in shown if re.search(r"\bnan\b|\binf\b", text)]


# The page


def test_no_scripts_and_no_external_resources(saved):
    _, root = saved
    for node in elements(root):
        assert node.tag not in {"script", "iframe", "object", "embed", "base", "form", "img"}
        for name, value in node.attributes.items():
            assert not name.startswith("on"), f"script in {name}"
            if name in {"src", "href", "srcset", "action", "data", "poster"}:
                assert value.startswith("data:")
            if name == "xlink:href":
                assert value.startswith("#")
            assert "url(" not in value


def test_headings_and_labels(saved):
    comparison, root = saved
    names = [run.name for run in comparison.runs]
    assert root.all("title")[0].text == f"{len(names)} runs: {', '.join(names)}"
    ids = [node.attributes["id"] for node in elements(root) if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in elements(root):
        assert set(node.attributes.get("aria-labelledby", "").split()) <= set(ids)
        if node.tag == "th":
            assert node.attributes["scope"] in {"row", "col"}


def test_tables_of_the_page_are_those_of_the_text(saved):
    comparison, root = saved
    text = as_text(comparison)
    for title in ("differences", "results"):
        head, *rows = section(root, title).all("table")[0].rows()
        assert head[1:] == [run.name for run in comparison.runs]
        assert all(len(row) == len(head) for row in rows)
        assert all(name in text for name, *_ in rows)
    results = {name: row for name, *row in section(root, "results").rows()}
    assert results["test accuracy"] == [
        "-" if run.test_accuracy is None else f"{run.test_accuracy:.4f}" for run in comparison.runs
    ]


def test_every_pair_is_in_the_page(saved):
    comparison, root = saved
    head, *rows = section(root, "tests").rows()
    assert ("p, Holm" in head) == (comparison.num_tests > 1)
    for row, pair in zip(rows, comparison.pairs, strict=True):
        assert row[:2] == [pair.first, pair.second]
        if isinstance(pair.counts, str):
            assert row[2:] == [pair.counts]
        else:
            cells = dict(zip(head, row, strict=True))
            assert cells["p"] == f"{pair.counts.p_value:.3g}"
            assert cells["Images"] == f"{len(pair.counts):,}"
            assert cells["Only first right"] == f"{pair.counts.only_first:,}"
            assert cells["Only second right"] == f"{pair.counts.only_second:,}"
    text = section(root, "tests").text
    assert ("was not evaluated: cannot read <b>/data</b>: No such file" in text) == any(
        isinstance(run.images, str) for run in comparison.runs
    )


def curve_of(chart, index):
    """The points of the line of a run, found by its color and dashes."""
    color, dashes = run_line(index)
    pattern = rf"stroke-dasharray: {','.join(f'{length:g}' for length in dashes)}; .*" if dashes else ""
    line = rf"fill: none; {pattern}stroke: var\(--{color}\)"
    (path,) = [path for path in chart.all("path") if re.match(line, path.attributes["style"])]
    return points(path)


@pytest.mark.parametrize("name", ["two", "ten"])
def test_curves_of_all_runs(name, tmp_path):
    runs = COMPARISONS[name]
    save_page(tmp_path / "comparison.html", compare(runs))
    root = read(tmp_path / "comparison.html")
    charts = section(root, "curves").all("svg", role="img")
    labels = [chart.attributes["aria-label"] for chart in charts]
    assert [label.partition(" by epoch")[0] for label in labels] == [
        "Test loss",
        "Test accuracy",
        "Train loss",
        "Train accuracy",
    ]
    for chart, get in zip(
        charts,
        (
            lambda record: record.test_loss,
            lambda record: record.test_accuracy,
            lambda record: record.loss / STEPS_PER_EPOCH,
            lambda record: record.train_accuracy,
        ),
        strict=True,
    ):
        texts = [text for text in chart.all("text") if re.fullmatch(r"[\d.]+", text.text)]
        x_ticks = [text for text in texts if "middle" in text.attributes["style"]]
        y_ticks = [text for text in texts if "end" in text.attributes["style"]]
        x = scale([float(tick.attributes["x"]) for tick in x_ticks], [int(tick.text) for tick in x_ticks])
        grid = [points(path) for path in chart.all("path") if "var(--rule)" in path.attributes["style"]]
        y = scale([line[0, 1] for line in grid], [float(tick.text) for tick in y_ticks])
        for index, run in enumerate(runs):
            values = [get(record) for record in run.history]
            line = curve_of(chart, index)
            drawn = y(np.interp(range(len(values)), x(line[:, 0]), line[:, 1]))
            spread = float(y_ticks[-1].text) - float(y_ticks[0].text)
            np.testing.assert_allclose(drawn, values, atol=5e-3 * spread)
            assert f"{run.name} {values[-1]:.4f}" in chart.attributes["aria-label"]
            marked = [use.text for use in chart.all("use") if f", {run.name}: " in use.text]
            epochs = range(len(values)) if len(values) <= 30 else [len(values) - 1]
            assert marked == [f"epoch {n}, {run.name}: {values[n]:.4f}" for n in epochs]


def test_a_chart_shows_only_runs_that_have_the_metric(tmp_path):
    save_page(tmp_path / "comparison.html", compare(COMPARISONS["different"]))
    root = read(tmp_path / "comparison.html")
    charts = section(root, "curves").all("svg", role="img")
    labels = [chart.attributes["aria-label"] for chart in charts]
    assert [label.partition(" by")[0] for label in labels[:2]] == ["Validation loss", "Validation accuracy"]
    for label, shown in zip(
        labels, 2 * [{"run1"}] + 2 * [{"run0", "run3"}] + 2 * [{"run0", "run1", "run3"}], strict=True
    ):
        assert set(re.findall(r"run\d", label)) == shown
    table = section(root, "curves").all("table")[0].rows()
    assert table[0] == ["Epoch", "run0", "run1", "run2", "run3"]
    assert [row[1:] for row in table[1:]] == [["-", f"{0.2 + 0.9 / (n + 1):.4f}", "-", "-"] for n in range(7)]


def test_no_curves_of_runs_without_an_epoch(tmp_path):
    save_page(tmp_path / "comparison.html", compare([make_run(n, history=(), step=7) for n in range(2)]))
    root = read(tmp_path / "comparison.html")
    assert [node.attributes["aria-labelledby"] for node in root.all("section")] == ["differences", "results", "tests"]


def test_twenty_runs_have_different_lines():
    assert len({run_line(index) for index in range(20)}) == 20
    for index in range(20):
        neighbors = run_line(index), run_line(index + 1)
        assert len({color for color, _ in neighbors}) == len({dashes for _, dashes in neighbors}) == 2


def test_contrasts_are_aa(saved):
    _, root = saved
    (style,) = root.all("style")
    blocks = re.findall(r":root {(.*?)}", style.text, re.DOTALL)
    light, dark, _ = (dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in blocks)
    assert light.keys() == dark.keys() >= RUN_COLORS.keys()
    for palette in (light, dark):
        for name in ("ink", "muted", *RUN_COLORS):
            darker, lighter = sorted(luminance(palette[color]) for color in (name, "paper"))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


def test_names_are_escaped(tmp_path):
    save_page(tmp_path / "comparison.html", compare(COMPARISONS["nasty"]))
    source = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in source
    assert "{{ 7 * 7 }}" in source


def test_a_name_that_is_not_unicode(tmp_path):
    comparison = compare([make_run(0, "caf\udce9"), make_run(1)])
    save_page(tmp_path / "comparison.html", comparison)
    assert section(read(tmp_path / "comparison.html"), "results").rows()[0][1] == "caf\N{REPLACEMENT CHARACTER}"
    assert r"caf\udce9" in as_text(comparison)


def test_the_page_is_deterministic(tmp_path):
    for name in ("first", "second"):
        save_page(tmp_path / name, compare(COMPARISONS["different"]))
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
