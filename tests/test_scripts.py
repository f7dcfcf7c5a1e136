"""The scripts that need nothing more than the package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.runs.fit import fit

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_single_batch_prints_a_smaller_second_loss(tmp_path):
    words = [sys.executable, SCRIPTS / "single_batch.py", "--dataset", "digits"]
    walked = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert walked.returncode == 0, walked.stderr
    losses = {name: float(loss) for name, loss in re.findall(r"^(loss\d): (\S+)$", walked.stdout, flags=re.MULTILINE)}
    assert losses.keys() == {"loss1", "loss2"}
    assert losses["loss2"] < losses["loss1"]
    assert "number correct:" in walked.stdout
    for gradient in ("conv1.kernel: [5, 5, 1, 6]", "fc1.kernel: [192, 120]", "out.bias: [10]"):
        assert f"gradient of {gradient}" in walked.stdout


def test_single_batch_errors_in_one_line(tmp_path):
    words = [sys.executable, SCRIPTS / "single_batch.py", "--dataset", "digit"]
    walked = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert walked.returncode == 2
    assert walked.stderr.startswith("error: unknown dataset 'digit'; did you mean 'digits'?")
    assert walked.stderr.count("\n") == 1


def run_script(name, *words, cwd):
    return subprocess.run(
        [sys.executable, SCRIPTS / name, *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_speedrun_prints_a_table(tmp_path):
    words = ["--config", "cpu", "--dataset", "digits", "--epochs", "1", "--seeds", "2", "--target", "0.01"]
    done = run_script("speedrun.py", *words, "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\| cnn_jax \| 2 \| 0\.\d{4} ± 0\.\d{4} \| \d+\.\d ± \d+\.\d \| \d+\.\d \| yes \|", row)
    results = json.loads((tmp_path / "result.json").read_text())["results"]["cnn_jax"]
    accuracies = [result["accuracy"] for result in results]
    assert f"{np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}" in row
    assert "seed: 1 cnn_jax: accuracy: " in done.stderr


@pytest.mark.parametrize("pretrained", ["given", "trained"])
def test_transfer_prints_a_table(tmp_path, pretrained):
    words = ["--examples", "1", "--seeds", "2"]
    if pretrained == "given":
        config = Config(dataset="digits", epochs=1, model="small", model_width=4)
        words += ["--init-from", fit(config, tmp_path / "run", report=False).workdir]
    else:
        words += ["--epochs", "2", "--model-depth", "6", "--model-width", "4"]
    done = run_script("transfer.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("epoch: 1 " in done.stderr) == (pretrained == "trained")
    assert re.fullmatch(r"\| 1 \| 0\.\d{3} ± 0\.\d{3} \| 0\.\d{3} ± 0\.\d{3} \|", done.stdout.splitlines()[-1])


def test_few_examples_are_of_every_class_or_refused(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from transfer import check_examples, choose

    labels = np.repeat(np.arange(5, dtype=np.int32), 30)
    split = Split(np.zeros((150, 2, 2, 1), np.uint8), labels)
    np.testing.assert_array_equal(np.bincount(choose(split, 4, 40, seed=0).labels), 5 * [8])
    dataset = Dataset("squares", split, split, tuple("abcde"))
    check_examples([1, 30], dataset)
    for number in (0, -1, 31):
        with pytest.raises(UsageError, match="--examples must be from 1 to 30 for squares"):
            check_examples([1, number], dataset)


def test_streaming_prints_a_table(tmp_path):
    words = ["--images", "60", "--side", "16", "--rounds", "1", "--batch-size", "10"]
    done = run_script("streaming.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    streamed, mapped = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"\| decoded whenever used \|( [\d,]+ \|){4} \d+\.\d% \|", streamed)
    assert re.fullmatch(r"\| memory-mapped \|  \|( [\d,]+ \|){3} \d+\.\d% \|", mapped)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speedrun.py", "--config", "cpa"], "error: no preset or file 'cpa'; did you mean 'cpu'?"),
        (["speedrun.py", "--epoch", "1"], "error: unknown argument '--epoch'; did you mean '--epochs'?"),
        (
            ["speedrun.py", "--target_accuracy", "0.5"],
            "error: this script needs the default of --target-accuracy, none",
        ),
        (["speedrun.py", "--workdir", "runs/a"], "error: this script needs the default of --workdir, none"),
        (["transfer.py", "--init-from", "nothing"], "error: "),
        (["transfer.py", "--init-from", "a", "--epochs", "2"], "error: this script needs the default of --epochs, "),
        (
            ["transfer.py", "--validation-fraction", "0.1"],
            "error: this script needs the default of --validation-fraction, 0.0",
        ),
        (["transfer.py", "--seeds", "0"], "error: --seeds must be at least 1"),
        (["transfer.py", "--examples", "200"], "error: --examples must be from 1 to "),
        (["speedrun.py", "--dataset", "digits", "--json", "missing/x.json"], "error: cannot write "),
        (["transfer.py", "--model-depth", "5"], "error: --model-depth must be a multiple of 3"),
    ],
)
def test_errors_of_scripts_are_one_line(tmp_path, words, message):
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("topic", "size", "sums"), [("classes", 20, 1), ("processes", 2, 1), ("networks", 2, 0)])
def test_scaling_measures_a_row(tmp_path, topic, size, sums):
    done = run_script("scaling.py", "--topics", topic, "--sizes", str(size), "--json", "rows.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"\| {topic} \| {size} \|( (\d[\d.,]*)? \|){{11}}", done.stdout.splitlines()[-1])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["topic"], row["size"], row["sums"]) == (topic, size, sums)
    measured = {"epoch", "us_per_image", "end", "memory_mb", "report_kb"}
    if topic != "networks":
        measured |= {"start", "compile", "cpu_us", "between"}
    assert row.keys() == measured | {"topic", "size", "sums", "sums_kb"}
    assert all(row[name] > 0 for name in measured - {"between"})


def test_side_by_side_prints_a_line_for_each_turn(tmp_path):
    done = run_script("side_by_side.py", "--dataset", "digits", "--epochs", "1", "--repeats", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = r"one after another: \d+\.\d\d s side by side: \d+\.\d\d s ratio: \d+\.\d\d"
    assert all(re.fullmatch(line, text) for text in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 2
