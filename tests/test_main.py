"""``python -m cnn_jax``, and what the parser of every command suggests."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cnn_jax
from cnn_jax import __main__, train
from cnn_jax.errors import UsageError
from cnn_jax.runs.workdir import Workdir


def test_it_lists_the_commands(capsys):
    assert __main__._run([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(__main__.COMMANDS)
    assert max(map(len, lines)) <= 80


def test_it_runs_a_command(capsys, tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path} is not a run directory"):
        __main__._run(["evaluate", str(tmp_path)])


def test_an_unknown_command_is_an_error():
    commands = "commands: train, sweep, evaluate, compare"
    with pytest.raises(UsageError, match=rf"unknown command 'trian'; did you mean 'train'\?; {commands}"):
        __main__._run(["trian"])


def test_the_console_script_and_every_command_print_the_version():
    script = Path(sys.executable).with_name("cnn-jax")
    for words in ([script], [script, "train"], [sys.executable, "-m", "cnn_jax.predict"]):
        done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"cnn_jax {cnn_jax.__version__}\n"
    assert metadata.version("cnn_jax") == cnn_jax.__version__


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("--lr", "--learning-rate"),
        ("--bs=5", "--batch-size"),
        ("--epoch", "--epochs"),
        ("photos", "--dataset folder:photos"),
    ],
)
def test_arguments_are_suggested(argument, suggestion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with pytest.raises(UsageError, match=f"unknown argument '{argument}'; did you mean '{suggestion}'"):
        train.parse([argument])


def test_nothing_is_suggested_for_what_is_like_no_flag():
    with pytest.raises(UsageError, match="unknown argument '--xyzzy'; see"):
        train.parse(["--xyzzy"])


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("JAX_PLATFORMS", "cuda", "there is no such device"),
        ("JAX_PLATFORMS", "abacus", "Unable to initialize backend 'abacus'"),
        ("JAX_NUM_CPU_DEVICES", "abc", 'Invalid value "abc" for JAX flag jax_num_cpu_devices'),
    ],
)
def test_without_a_device_it_is_one_line(variable, value, reason, tmp_path):
    command = [sys.executable, "-m", "cnn_jax", "evaluate", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {variable: value}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: jax cannot start ({reason}")
    assert done.stderr.endswith("): check JAX_PLATFORMS, JAX_NUM_CPU_DEVICES and XLA_FLAGS\n")


@pytest.mark.parametrize(
    ("workdir", "problem"),
    [
        ("gs://bucket/run", r"gs:/bucket/run is a URL: choose a local directory"),
        ("b\udcff", r"b\\udcff cannot be encoded as UTF-8: choose another --workdir"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_refused(workdir, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=problem):
        Workdir(Path(workdir)).create()
    assert not list(tmp_path.iterdir())
