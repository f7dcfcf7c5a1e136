"""``python -m cnn_jax.compare``: its text, JSON, page and errors."""

import csv
import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binomtest

from cnn_jax import cli, compare, evaluate
from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.runs.fit import StoppedError, fit
from cnn_jax.training.mcnemar import holm


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory of runs on digits: two seeds, a validation split, and one stopped after two of three epochs."""
    root = tmp_path_factory.mktemp("runs")
    for name, settings in {
        "first": {},
        "second": {"seed": 1},
        "validated": {"validation_fraction": 0.1, "learning_rate": 0.001},
    }.items():
        fit(Config(dataset="digits", epochs=1, **settings), root / name, report=False)
    calls = iter(range(2))
    with pytest.raises(StoppedError):
        fit(Config(dataset="digits", epochs=3), root / "stopped", stop_requested=lambda: next(calls, None) is None)
    return root


@pytest.fixture
def call(runs, monkeypatch, capsys):
    """Run the command in the directory of the runs; returns its exit status, standard output and standard error."""
    monkeypatch.chdir(runs)

    def call(*words, command=compare):
        monkeypatch.setattr("sys.argv", ["compare", *map(str, words)])
        status = cli.run(command.main)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def is_correct(call, tmp_path):
    """Whether a run classifies each test image correctly, according to ``evaluate --predictions``."""

    def is_correct(name):
        assert call(name, "--predictions", tmp_path / "predictions.csv", command=evaluate)[0] == 0
        with (tmp_path / "predictions.csv").open(newline="") as file:
            return np.array([row["label"] == row["prediction"] for row in csv.DictReader(file)])

    return is_correct


def test_from_the_command_line(runs):
    words = [sys.executable, "-m", "cnn_jax.compare", "first", "second", "--report", "comparison.html"]
    done = subprocess.run(words, cwd=runs, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^seed +0 +1$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^first and second: 360 test images of both$", done.stdout, flags=re.MULTILINE)
    assert re.search(r"^  p = \S+$", done.stdout, flags=re.MULTILINE)
    assert "first and second" not in (page := (runs / "comparison.html").read_text())
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<svg viewBox") == 4


def test_the_test_agrees_with_the_predictions_of_evaluate(call, is_correct):
    names = ("first", "second", "stopped", "validated")
    status, out, err = call(*names, "--json")
    assert (status, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out)
    correct = {name: is_correct(name) for name in names}
    for run in result["runs"]:
        assert run["test_accuracy"] == correct[run["name"]].mean()
    for pair in result["pairs"]:
        one, other = (correct[pair[key]] for key in ("first", "second"))
        only_one, only_other = int(np.sum(one > other)), int(np.sum(one < other))
        assert (pair["only_first"], pair["only_second"], pair["examples"]) == (only_one, only_other, 360)
        assert pair["p_value"] == pytest.approx(binomtest(only_one, only_one + only_other).pvalue)
        assert pair["difference"] == pytest.approx(one.mean() - other.mean())
        assert pair["interval"][0] < pair["difference"] < pair["interval"][1]
    adjusted = [pair["adjusted_p_value"] for pair in result["pairs"]]
    assert adjusted == holm([pair["p_value"] for pair in result["pairs"]])
    assert set(result["differences"]) == {"validation_fraction", "learning_rate", "epochs", "seed", "data_sha256"}


def test_a_run_that_is_not_finished(call):
    status, out, _ = call("first", "stopped")
    assert status == 0
    rows = {name: row for name, *row in (re.split(r" {2,}", line) for line in out.splitlines())}
    assert rows["epochs"] == ["1", "2 of 3"]
    assert rows["device"][1] == "-"
    assert rows["parameters"] == 2 * ["32,998"]


def test_the_best_checkpoint(call, runs):
    run = fit(Config(dataset="digits", epochs=3, learning_rate=0.05), runs / "longer", report=False)
    accuracies = [record.test_accuracy for record in run.history]
    out = json.loads(call("first", "longer", "--checkpoint", "best", "--json")[1])
    assert out["runs"][1]["test_accuracy"] == max(accuracies)
    assert call("first", "longer", "--checkpoint", "worst")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN...; see python -m cnn_jax.compare --help"),
        (["first"], "only one run is named, first: name the run directories to compare it with"),
        (["first", "./first"], "first is named twice: name each run once"),
        (["first", "no/such"], "no/such is not a run directory: choose one that training created"),
        (["first", "second", "--reprot", "a"], "unknown argument '--reprot'; did you mean '--report'?"),
        (["first", "second", "--report", "."], "is not a regular file: choose another file"),
        (["first", "second", "--report", "no/such.html"], "(No such file or directory): choose another file"),
    ],
)
def test_invalid_input_is_one_line_and_status_2(call, words, message):
    status, out, err = call(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


def test_a_named_dataset_that_cannot_be_loaded_is_an_error(call):
    status, out, err = call("first", "second", "--dataset", "folder:no/such")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match("error: .*no/such", err)


def test_own_data_that_cannot_be_loaded_is_one_line_and_the_rest_is_printed(call, runs, monkeypatch):
    def load(config):
        raise UsageError("no/such is not a folder")

    monkeypatch.setattr("cnn_jax.data.load", load)
    status, out, err = call("first", "second", "--report", "comparison.html")
    assert (status, err) == (0, "")
    for name in ("first", "second"):
        assert re.search(rf"^{name} was not evaluated: .*no/such.*", out, flags=re.MULTILINE)
    assert "p =" not in out
    accuracies = re.search(r"^test accuracy +(\S+) +(\S+)$", out, flags=re.MULTILINE).groups()
    recorded = [json.loads((runs / name / "summary.json").read_text())["test_accuracy"] for name in ("first", "second")]
    assert list(accuracies) == [f"{accuracy:.4f}" for accuracy in recorded]


def test_an_existing_report_stays_if_the_comparison_fails(call, tmp_path):
    report = tmp_path / "comparison.html"
    report.write_text("precious")
    assert call("first", "first", "--report", report)[0] == 2
    assert report.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [report]


def test_a_full_disk_is_one_line_and_status_1(call, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cnn_jax.report.comparison.save_page", fail)
    status, out, err = call("first", "second", "--report", tmp_path / "comparison.html")
    assert (status, out) == (1, "")
    assert err.endswith("(No space left on device): free some space, or choose another file\n")
    assert list(tmp_path.iterdir()) == []


def test_lines_fit_the_terminal(call, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    status, out, _ = call("first", "second", "validated")
    assert status == 0
    assert all(len(line) <= 50 for line in out.splitlines() if re.match(r"[\w ]+  ", line))
    assert len(re.findall("^results", out, flags=re.MULTILINE)) > 1
