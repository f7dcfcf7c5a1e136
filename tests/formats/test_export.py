"""The command."""

import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from cnn_jax import cli, export
from cnn_jax.config import Config
from cnn_jax.report import plots
from cnn_jax.runs.fit import fit
from cnn_jax.runs.run import load_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on data that the command finds again."""
    workdir = tmp_path_factory.mktemp("user") / "run"
    with (  # drawing takes most of the time of so small a training
        mock.patch.object(plots, "save_curves", lambda path, *figures: path.touch()),
        mock.patch.object(plots, "save_confusion", lambda path, *figures: path.touch()),
    ):
        fit(Config(dataset="digits", epochs=1), workdir)
    return workdir


def test_a_line_on_standard_output_and_a_file_in_the_run(digits):
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


def test_a_path_is_printed_so_that_no_terminal_obeys_it(digits, tmp_path, monkeypatch, capsys):
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
        (["{run}", "--format", "pytorch", "--output", "."], ". already exists: choose another --output"),
    ],
)
def test_nonsense_is_status_2_in_one_line(digits, tmp_path, monkeypatch, capsys, words, message):
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
