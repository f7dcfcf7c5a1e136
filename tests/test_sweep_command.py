"""``python -m cnn_jax.sweep`` and ``train --seeds``: what they print and write, and their exit status."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cnn_jax import cli, sweep, train
from cnn_jax.settings import Range

WORDS = ("--dataset", "digits", "--epochs", "1", "--batch-size", "200")

LINE = re.compile(r"(\d+)/(\d+) (\S+) test_accuracy: [01]\.\d{4} test_loss: \d+\.\d{4} seconds: \d+\.\d\d")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in an empty directory; returns its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(command, *words):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        status = cli.run(command.main)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_every_network_is_a_line_and_every_combination_a_row(call, tmp_path):
    status, out, err = call(sweep, *WORDS, "--learning-rate", "0.01", "1e-9", "--seeds", "2", "--workdir", "sweep")
    assert (status, err) == (0, "4 networks in sweep\nsweep directory: sweep; see report.html\n")
    *lines, header, first, second = out.splitlines()
    printed = [LINE.fullmatch(line).groups() for line in lines]
    assert [(number, total) for number, total, _ in printed] == [(str(number), "4") for number in (1, 2, 3, 4)]
    assert header.split() == ["learning_rate", "test_accuracy", "best", "n", "seconds"]
    assert first.split()[0] == "0.01"
    assert second.split()[0] == "1e-09"
    members = {path.name for path in (tmp_path / "sweep" / "members").iterdir()}
    assert members == {name for *_, name in printed}
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines()))
    assert {row["member"] for row in rows} == members
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        *("accuracy.png", "claims", "members", "report.html", "results.csv", "results.json", "sweep.json")
    }
    resumed = call(sweep, "--resume", "--workdir", "sweep", "--json")
    assert resumed[0] == 0
    assert json.loads(resumed[1]) == json.loads((tmp_path / "sweep" / "results.json").read_text())


def test_seeds_of_train_print_their_mean_and_standard_deviation(call):
    status, out, _ = call(train, *WORDS, "--seeds", "3", "--seed", "5", "--workdir", "seeds")
    assert status == 0
    *lines, last = out.splitlines()
    assert [LINE.fullmatch(line)[3] for line in lines] == ["seed=5", "seed=6", "seed=7"]
    assert re.fullmatch(r"test_accuracy: 0\.\d{4} ± 0\.\d{4} \(n=3\)", last)


def test_a_target_that_is_not_reached_is_status_3(call):
    status, _, _ = call(train, *WORDS, "--seeds", "2", "--target-accuracy", "0.99", "--workdir", "seeds")
    assert status == 3
    assert call(sweep, "--resume", "--workdir", "seeds")[0] == 3


def test_a_sweep_of_nothing_but_failures_is_a_failure(call):
    status, out, _ = call(sweep, *WORDS, "--learning-rate", "1e9", "--batch-size", "50", "--workdir", "sweep")
    assert status == 1
    assert "1/1 run: the loss or the gradient is not finite" in out
    assert out.endswith("failed: 1\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "0.1", "fast"], "--learning-rate must be a positive number below 2**31, not 'fast'; see"),
        (["--learning-rate", "0.1", "0.10"], "learning_rate has a value twice: 0.1, 0.1"),
        (["--learning-rate", "1e-4..1e-1"], "--learning-rate 0.0001..0.1 is a range, which needs --search"),
        (
            ["--learning-rate", "1..0.1", "--search", "3"],
            "must be a range from a smaller to a larger number, not 1..0.1",
        ),
        (
            ["--learning-rate", "0.1..x", "--search", "3"],
            "--learning-rate must be a positive number below 2**31, not 'x'",
        ),
        (["--learning-rate", "0.1..", "--search", "3"], "must be a range such as 1e-4..1e-1, not '0.1..'"),
        (["--learning-rate", "0.1..1", "2", "--search", "3"], "takes one range or several values, not both"),
        (["--dataset", "digits", "folder:x/y"], "cannot read the folder"),
        (["--dataset", "digits", "--init-from", "no.safetensors", "none"], "no.safetensors"),
        (["--search", "3"], "--search needs a setting that varies, such as --learning-rate 1e-4..1e-1"),
        (["--seeds", "3", "--seed", "1", "2"], "give one --seed with --seeds, or several without it"),
        (["--seeds", "3", "--search", "2", "--epochs", "1", "2"], "--search trains every combination with one seed"),
        (["--optimizer", "adam", "admw"], "--optimizer must be adam, adamw, sgd or muon, not 'admw'; see"),
        (["--optimizer", "adamw", "adam", "--weight-decay", "0.1"], "adam has no weight decay: use --optimizer adamw"),
        (["--model", "cnn", "cmn"], "unknown model 'cmn'; did you mean 'cnn'?"),
        (["--workdir", "a", "b"], "unknown argument 'b'"),
        (["--resume"], "--resume needs --workdir"),
        (
            ["--resume", "--workdir", "no/such"],
            "no/such is not the directory of a sweep: choose one that sweep created",
        ),
        (
            ["--resume", "--workdir", "x", "--epochs", "10"],
            "continues with the settings of the sweep: leave out --epochs",
        ),
        (["--dataset", "digits", "--search", "3", "--epochs", "1", "2"], "set --validation-fraction, such as 0.1"),
    ],
)
def test_invalid_arguments_are_one_line_and_status_2(call, tmp_path, words, message):
    status, out, err = call(sweep, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_values_of_flags():
    words = ("--config", "tutorial", "--learning-rate", "1e-3..0.1", "--batch_size", "50", "60", "--epochs", "3")
    flags, varied = sweep.parse([*words, "--search", "5", "--no-shuffle", "--image-size", "20", "30"])
    assert varied == {"learning_rate": Range(0.001, 0.1), "batch_size": (50, 60)}
    assert (flags.epochs, flags.dataset, flags.image_size, flags.seed) == (3, "fashion_mnist", (20, 30), 0)


def test_a_killed_sweep_is_resumed_by_two_processes(tmp_path):
    """Both exit with all results, whoever trained them."""
    command = [sys.executable, "-m", "cnn_jax.sweep"]
    words = ["--dataset", "digits", "--epochs", "4", "--batch-size", "50", "--seeds", "5", "--workdir", "sweep"]
    with subprocess.Popen([*command, *words], cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("sweep/members/*/checkpoints/*/sha256sums")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    resume = [*command, "--resume", "--workdir", "sweep", "--json"]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": os.environ}
    with subprocess.Popen(resume, **options) as first, subprocess.Popen(resume, **options) as second:
        results = [process.communicate(timeout=300) for process in (first, second)]
        assert first.returncode == second.returncode == 0, results
    tables = [json.loads(out) for out, _ in results]
    assert max(table["combinations"][0]["test_accuracy"]["n"] for table in tables) == 5
    assert not list(tmp_path.glob("sweep/members/*/ended.json"))
