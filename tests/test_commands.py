"""The contract of the commands: what they print and write, and their exit status."""

import dataclasses
import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from cnn_jax import cli, compare, evaluate, export, predict, train
from cnn_jax.config import Config
from cnn_jax.runs.fit import fit

LINE = re.compile(
    r"epoch: (\d+) total_correct: \d+ loss: \d+\.\d\d test_accuracy: [01]\.\d{4} test_loss: \d+\.\d{4} "
    r"seconds: \d+\.\d\d images_per_second: \d+"
)

OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
"""The environment variable with which a process compiles as it does for users, unlike in most tests."""


def python(*words: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A run as users train it, optimized: the process, and its run directory."""
    cwd = tmp_path_factory.mktemp("user")
    words = ("-m", "cnn_jax.train", "--dataset", "digits", "--epochs", 2, "--workdir", "run")
    trained = python(*words, cwd=cwd, env=os.environ | OPTIMIZED | {"MPLBACKEND": "no backend"})
    return trained, cwd / "run"


def test_training_prints_one_line_per_epoch(digits_run):
    trained, run = digits_run
    assert trained.returncode == 0, trained.stderr
    assert [LINE.fullmatch(line)[1] for line in trained.stdout.splitlines()] == ["0", "1"]
    first, best, workdir = trained.stderr.splitlines()
    processors = len(os.sched_getaffinity(0))
    assert first.startswith(
        "digits: 1,437 train and 360 test images of 28x28x1 in 10 classes; cnn: 32,998 parameters; "
        f"{processors} CPU device"
    )
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert best == f"best epoch: 1 with a test accuracy of {accuracy:.4f}; see report.html"
    assert workdir == "run directory: run"


def test_lines_and_files_agree(digits_run):
    trained, workdir = digits_run
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line, record in zip(trained.stdout.splitlines(), records, strict=True):
        printed = dict(re.findall(r"(\w+): (\S+)", line))
        assert int(printed["total_correct"]) == record["total_correct"]
        assert printed["test_accuracy"] == f"{record['test_accuracy']:.4f}"
    assert json.loads((workdir / "summary.json").read_text())["test_accuracy"] == records[-1]["test_accuracy"]


def test_evaluation_prints_the_results_of_training(digits_run):
    trained, workdir = digits_run
    evaluated = python("-m", "cnn_jax.evaluate", workdir, cwd=workdir, env=os.environ | OPTIMIZED)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    figures = re.search(r"test_accuracy: \S+ test_loss: \S+", trained.stdout.splitlines()[-1])[0]
    assert figures in evaluated.stdout.splitlines()[0]
    assert "precision    recall  f1-score   support" in evaluated.stdout
    assert "most confused:" in evaluated.stdout


def test_resuming_needs_no_other_flags_and_a_missed_target_is_status_3(digits_run, tmp_path):
    shutil.copytree(digits_run[1], tmp_path / "run")
    words = ("--workdir", "run", "--resume", "--epochs", 3, "--target-accuracy", 1.0)
    resumed = python("-m", "cnn_jax.train", *words, cwd=tmp_path)
    assert resumed.returncode == 3, resumed.stderr
    assert [LINE.fullmatch(line)[1] for line in resumed.stdout.splitlines()] == ["2"]
    assert "the accuracy did not reach 1.0 in 3 epochs\n" in resumed.stderr


def test_a_target_missed_in_one_epoch(tmp_path, capsys):
    words = ("--dataset", "digits", "--epochs", "1", "--target-accuracy", "1.0", "--workdir", str(tmp_path / "run"))
    assert train.main(words) == 3
    assert capsys.readouterr().err.endswith("the accuracy did not reach 1.0 in 1 epoch\n")


@pytest.mark.optimized
def test_results_are_the_same_in_another_process_and_with_deterministic(digits_run, tmp_path):
    config = Config(dataset="digits", epochs=1, deterministic=True)
    (record,) = fit(config, tmp_path / "run", report=False).history
    first = json.loads((digits_run[1] / "metrics.jsonl").read_text().splitlines()[0])
    for key in ("total_correct", "loss", "test_loss", "test_accuracy"):
        assert record.to_json()[key] == first[key]


def test_progress_bar_on_a_terminal(tmp_path):
    """The bar is drawn on standard error if that is a terminal; standard output stays plain."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "cnn_jax.train", "--dataset", "digits", "--epochs", "1", "--workdir", "run"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    drawn = b""
    while process.poll() is None or not drawn:
        try:
            drawn += os.read(ours, 4096)
        except OSError:  # the terminal is gone with the process
            break
    out, _ = process.communicate()
    os.close(ours)
    assert b"epoch 1/1" in drawn
    assert all(LINE.fullmatch(line) for line in out.splitlines())
    assert len(out.splitlines()) == 1


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["PYTHONWARNINGS"] = "ignore"  # damaged entries are repaired when jax warns of them, in any case

    def train(workdir):
        words = ("-m", "cnn_jax.train", "--dataset", "digits", "--epochs", 1, "--workdir", workdir)
        trained = python(*words, cwd=tmp_path, env=environment)
        assert trained.returncode == 0
        assert trained.stderr.splitlines()[2:] == [f"run directory: {workdir}"]

    train("first")
    cache = tmp_path / "cnn_jax" / "compiled"
    assert cache.stat().st_mode & 0o777 == 0o700
    entries = list(cache.glob("*-cache"))
    assert any("train_chunk" in path.name for path in entries)
    assert any("chunk_logits" in path.name for path in entries)
    damaged = {path: path.read_bytes()[: path.stat().st_size // 2] for path in entries}
    for path, content in damaged.items():
        path.write_bytes(content)
    train("second")
    # A program that compiles quickly is not kept.
    kept = [path for path in entries if path.exists()]
    assert any("train_chunk" in path.name for path in kept)
    assert not [path.name for path in kept if path.read_bytes() == damaged[path]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), 1),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 15414067200 bytes."), 1),
        (RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 7 bytes."), 1),
    ],
)
def test_out_of_memory_is_one_line(capsys, error, expected):
    def fail(args):
        raise error

    assert cli.run(fail) == expected
    assert capsys.readouterr().err == (
        "error: out of memory: use smaller images, a smaller --batch-size, or a machine with more memory\n"
    )


def test_a_signal_while_the_process_exits_changes_nothing(tmp_path):
    """jax cleans up for a second, in which an impatient user presses Ctrl-C again."""
    program = (
        "import atexit, os, signal; from cnn_jax import cli; "
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); cli.start(lambda args: 3)"
    )
    ended = python("-c", program, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (3, "")


def test_broken_pipe_is_success_only_for_standard_output(capsys):
    def fail(args):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "/some/file")

    assert cli.run(fail) == 1
    assert capsys.readouterr().err == "error: Broken pipe: /some/file\n"


def test_closed_standard_streams(digits_run, tmp_path):
    """Files do not get the descriptors of closed streams, where messages would be written into them."""
    _, workdir = digits_run
    words = [sys.executable, "-m", "cnn_jax.export", str(workdir), "--format", "safetensors", "--output", "file"]
    shell = ["bash", "-c", 'exec "$@" 0>&- 1>&- 2>&-', "bash", *words]
    exported = subprocess.run(shell, cwd=tmp_path, check=False)
    assert exported.returncode == 0
    assert load_file(tmp_path / "file")


def run_script(script, redirection, cwd):
    """Run a command that does nothing but what the script says, with redirected streams."""
    words = ["bash", "-o", "pipefail", "-c", f'"$@" {redirection}', "bash", sys.executable, "-c", script]
    # Buffered as by default, so that output is written when the process ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_closed_standard_stream(tmp_path, descriptor):
    script = """
import sys
from cnn_jax import cli
def main(args):
    with open("file", "w") as file:
        print("to standard output")
        cli.say("to standard error")
        sys.stdout.flush()
        file.write("content")
    return 0
cli.start(main)
"""
    done = run_script(script, f"{descriptor}>&-", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "content"
    assert done.stdout == ("" if descriptor == 1 else "to standard output\n")
    assert done.stderr == ("" if descriptor == 2 else "to standard error\n")


@pytest.mark.parametrize(("redirection", "status"), [("> /dev/full", 1), ("| true", 0)])
def test_output_that_cannot_be_written_is_one_line(tmp_path, redirection, status):
    script = "from cnn_jax import cli; cli.start(lambda args: print('line') or 0)"
    done = run_script(script, redirection, tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (status, status), done.stderr


def test_training_goes_on_when_nobody_reads_its_output(tmp_path):
    """As with ``| head -1``."""
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "cnn_jax.train", "--dataset=digits", "--epochs=1", "--workdir=run"]
    unread = subprocess.run(words, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert unread.returncode == 0
    assert unread.stderr.splitlines()[2:] == [b"run directory: run"]
    assert (tmp_path / "run" / "summary.json").exists()


def call(command, monkeypatch, capsys, *words):
    """Status and messages of a command called in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    status = cli.run(command.main)
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochz", 3], "unknown argument '--epochz'; did you mean '--epochs'?; see python -m cnn_jax.train --help"),
        (["--EPOCHS", 3], "did you mean '--epochs'?"),
        (["--epochs=ten"], "--epochs must be a positive integer below 2**31, not 'ten'; see"),
        (["--epochs", 0], "--epochs must be a positive integer below 2**31, not '0'; see"),
        (["--batch_size", -5], "--batch-size must be a positive integer below 2**31, not '-5'; see"),
        (["--learning-rate", "fast"], "--learning-rate must be a positive number below 2**31, not 'fast'; see"),
        (["--learning-rate", "nan"], "--learning-rate must be a positive number below 2**31, not 'nan'; see"),
        (["--target-accuracy", 90], "--target-accuracy must be greater than 0 and at most 1, not '90'; see"),
        (["--checkpoint-every", 1.5], "--checkpoint-every must be a positive integer below 2**31, not '1.5'; see"),
        (["--image-size", 28], "--image-size: expected 2 arguments; see"),
        (["--image-size", 28, "x"], "--image-size must be two integers from 1 to 10000, not '28 x'; see"),
        (["--epochs"], "--epochs: expected one argument; see"),
        (["--no_shufle"], "unknown argument '--no-shufle'; did you mean '--no-shuffle'?"),
        (["fashion_mnist"], "unknown argument 'fashion_mnist'; see"),
        (["--dataset", "fashion-mnist"], "did you mean 'fashion_mnist'?"),
        (["--dataset", "Digits"], "did you mean 'digits'?"),
        (["--dataset", "tfds:"], "unknown dataset 'tfds:'"),
        (["--dataset", "digits", "--model", "cmn"], "unknown model 'cmn'; did you mean 'cnn'?"),
        (["--config", "tutorail"], "did you mean 'tutorial'?"),
        (["--config", "no/such.yaml"], "cannot read the config no/such.yaml: No such file or directory"),
        (["--resume"], "--resume needs --workdir"),
        (["--resume", "--workdir", "no/such"], "no/such is not a run directory"),
    ],
)
def test_invalid_arguments_are_one_line_and_status_2(monkeypatch, capsys, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    status, err = call(train, monkeypatch, capsys, *words)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN; see python -m cnn_jax.evaluate --help"),
        (["no/such"], "no/such is not a run directory"),
        (["run", "--checkpoint", "bets"], "--checkpoint must be newest or best, not 'bets'; see"),
    ],
)
def test_invalid_arguments_of_evaluate_are_one_line_and_status_2(monkeypatch, capsys, words, message):
    status, err = call(evaluate, monkeypatch, capsys, *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_flags_override_the_preset():
    flags = train.parse(["--config", "tutorial", "--batch_size", "50"])
    assert (flags.dataset, flags.shuffle, flags.batch_size) == ("fashion_mnist", False, 50)
    assert train.parse([]).shuffle


def has_handler(process):
    """Whether a process handles SIGTERM; before that, Python itself is starting."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), flags=re.MULTILINE)[1]
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


def is_importing_jax(process):
    return "jaxlib" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.parametrize("has_begun", [has_handler, is_importing_jax])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_before_the_first_checkpoint_is_one_line(tmp_path, has_begun, number, status):
    words = [sys.executable, "-m", "cnn_jax.train", "--dataset", "digits", "--epochs", "100000", "--workdir", "run"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not has_begun(process):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--config", "x" * 300], 2),
        (["--workdir", "x" * 300], 1),
        (["--data-dir", "~nobody-of-that-name/x"], 2),
        (["--init-from", "~nobody-of-that-name/x"], 2),
    ],
)
def test_what_the_system_refuses_is_one_line(monkeypatch, capsys, tmp_path, words, status):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    assert call(train, monkeypatch, capsys, "--dataset", "digits", *words)[0] == status
    assert list(tmp_path.iterdir()) == []


def test_flags_may_be_spelled_with_underscores_and_follow_positional_arguments(monkeypatch):
    assert not train.parse(["--no_shuffle"]).shuffle
    args = ["run", "--top_k", "2", "a.png", "--json", "--", "--b_c.png"]
    flags = cli.parse(predict.PredictFlags, args, module="cnn_jax.predict")
    assert (flags.run, flags.top_k, flags.paths, flags.json) == ("run", 2, ("a.png", "--b_c.png"), True)


@pytest.mark.parametrize("command", [train, evaluate, compare, predict, export])
def test_help_fits_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "-\n" not in out


def test_help_groups_the_flags_of_training_by_topic(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    groups = re.findall(r"^(\w+):$", out, flags=re.MULTILINE)
    assert groups == ["options", "data", "model", "augmentation", "optimizer", "training"]
    for field in dataclasses.fields(Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", out, flags=re.MULTILINE)
    assert "the learning rate, or the highest one of a schedule (default: 0.01)" in " ".join(out.split())
