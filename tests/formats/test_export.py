"""``python -m cnn_jax.export``."""

import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from cnn_jax import cli, export
from cnn_jax.config import Config
from cnn_jax.runs.fit import fit
from cnn_jax.runs.run import load_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on a dataset that the command can load."""
    workdir = tmp_path_factory.mktemp("user") / "run"
    fit(Config(dataset="digits", epochs=1), workdir, report=False)
    return workdir


def test_export_writes_a_file_into_the_run_and_prints_a_line(digits):
    words = [sys.executable, "-m", "cnn_jax.export", "run", "--format", "safetensors"]
    done = subprocess.run(words, cwd=digits.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    line = re.fullmatch(
        r"run/model\.safetensors: verified on 300 images, largest difference (\d\.\de-\d\d)\n", done.stdout
    )
    assert float(line[1]) < 1e-5
    exported = load_file(digits / "model.safetensors")
    params = load_run(digits).state.params
    np.testing.assert_array_equal(exported["fc1.kernel"], params["fc1"]["kernel"])


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    status = cli.run(export.main)
    return status, capsys.readouterr()


@pytest.mark.parametrize("format", ["stablehlo", "pytorch"])
def test_output_names_the_file(digits, tmp_path, monkeypatch, capsys, format):
    path = tmp_path / "network"
    words = (digits, "--format", format, "--output", path, "--checkpoint", "best", "--data-dir", tmp_path)
    status, captured = call(monkeypatch, capsys, *words)
    assert (status, captured.err) == (0, "")
    assert captured.out.startswith(f"{path}: verified on 300 images")
    assert path.is_file()


def test_terminal_sequences_in_a_path_are_escaped(digits, tmp_path, monkeypatch, capsys):
    path = tmp_path / "\x1b[31m\u202e"
    status, captured = call(monkeypatch, capsys, digits, "--format", "safetensors", "--output", path)
    assert (status, captured.err) == (0, "")
    assert captured.out.startswith(rf"{tmp_path}/\x1b[31m\u202e: verified on 300 images")
    assert captured.out.removesuffix("\n").isprintable()
    assert path.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN; see "),
        (["{run}"], "--format is required; see "),
        (
            ["{run}", "--format", "tflite"],
            "--format must be stablehlo, onnx, safetensors or pytorch, not 'tflite'; see ",
        ),
        (["{run}", "--format", "onnx", "--ouput", "x"], "unknown argument '--ouput'; did you mean '--output'?"),
        (["no/such", "--format", "pytorch"], "no/such is not a run directory"),
        (["{run}", "--format", "pytorch", "--output", "no/such"], "cannot write no/such (No such file or directory)"),
        (["{run}", "--format", "pytorch", "--output", "."], ". already exists: remove it, or choose another --output"),
    ],
)
def test_invalid_arguments_are_one_line_and_status_2(digits, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    status, captured = call(monkeypatch, capsys, *(word.format(run=digits) for word in words))
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        export.main(["--help"])
    assert exit.value.code == 0
    assert "--output" in capsys.readouterr().out
