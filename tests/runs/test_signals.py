"""Signals and kills, sent to processes."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import assert_same_outcome, finished_checkpoints, wait_until_trained

from cnn_jax.config import Config
from cnn_jax.runs.fit import fit, resume

CONFIG = Config(dataset="digits", epochs=4, batch_size=40, checkpoint_every=7, seed=5)


def command(workdir, *words, epochs=CONFIG.epochs):
    """The command that trains ``CONFIG``."""
    flags = ["--dataset=digits", f"--epochs={epochs}", "--batch-size=40", "--checkpoint-every=7", "--seed=5"]
    return [sys.executable, "-m", "cnn_jax.train", *flags, "--workdir", str(workdir), *words]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run directory of ``CONFIG``, trained in this process, which compiles the programs for the others."""
    return fit(CONFIG, tmp_path_factory.mktemp("uninterrupted") / "run", report=False).workdir


@contextlib.contextmanager
def start(words, stderr, wait=lambda process: None):
    """Start a process with some kind of standard error, and kill it at the end.

    Args:
        words: the command.
        stderr: ``read``; ``closed``; ``full``, a full disk; ``broken``, a pipe whose reader has exited; ``blocked``, a
            pipe that is full because its reader does not read.
        wait: called with the process before its pipe is broken or blocked.
    """
    redirection = {"full": "2>/dev/full", "closed": "2>&-"}.get(stderr, "")
    shell = ["bash", "-c", f'exec "$@" {redirection}', "bash", *words]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait(process)
            if stderr == "broken":
                process.stderr.close()
                process.stderr = None
            elif stderr == "blocked":
                pipe = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
                with contextlib.suppress(BlockingIOError):
                    while os.write(pipe, bytes(4096)):
                        pass
                os.close(pipe)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "status", "stderr"),
    [(signal.SIGTERM, 143, "read"), (signal.SIGINT, 130, "blocked"), (signal.SIGHUP, 129, "closed")],
)
def test_stopped_training_saves_and_can_be_resumed(tmp_path, uninterrupted, number, status, stderr):
    workdir = tmp_path / "run"
    with start(command(workdir), stderr, lambda process: wait_until_trained(workdir, process)) as process:
        saved = finished_checkpoints(workdir)
        process.send_signal(number)
        assert process.wait(timeout=60) == status
        if stderr == "read":
            resume_command = f"python -m cnn_jax.train --resume --workdir {workdir}"
            assert re.search(rf"stopped after step \d+: continue with {resume_command}\n", process.stderr.read())
    assert finished_checkpoints(workdir) - saved
    assert (workdir / ".lock").read_bytes() == b"", "what was meant for standard error went into a file"
    resume(workdir, report=False)
    assert_same_outcome(workdir, uninterrupted)


WAITING = """
import signal
from cnn_jax import cli
def main(args):
    with cli.StopSignals() as signals:
        print(signals.received(), flush=True)
        while not signals.received():
            signal.pause()
    cli.say("stopped")
    return signals.exit_status
cli.start(main)
"""
"""A command that waits for a signal as training does, without the time it takes to train."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stderr", ["read", "broken", "closed", "full", "blocked"])
def test_exit_status_names_the_signal(number, stderr):
    with start([sys.executable, "-c", WAITING], stderr, lambda process: process.stdout.readline()) as process:
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        if stderr == "read":
            lines = ["stopping after this chunk; interrupt again to stop immediately", "stopped"]
            assert process.stderr.read().splitlines() == lines


WORKING = """
import signal
from cnn_jax.cli import StopSignals
with StopSignals() as signals:
    print(signals.received(), flush=True)
    while True:
        signal.pause()
"""
"""A process that has called ``received`` once and does not call it again, as in a chunk that takes long."""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_second_signal_stops_immediately(first, second):
    with start([sys.executable, "-c", WORKING], "read", lambda process: process.stdout.readline()) as process:
        process.send_signal(first)
        assert process.stderr.readline() == "stopping after this chunk; interrupt again to stop immediately\n"
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=10) == 128 + second
        assert process.stderr.read() == "interrupted\n"


def test_ignored_signal_stays_ignored():
    """As Ctrl-C is in what a shell starts in the background, and a hang-up under nohup."""
    script = """
import signal
from cnn_jax.cli import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopSignals() as signals:
    signals.received()
    signal.raise_signal(signal.SIGHUP)
    print(signals.received())
    signal.raise_signal(signal.SIGTERM)
    print(signals.received(), signals.exit_status)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "143"]


def test_immediate_stop_removes_temporary_files(tmp_path):
    script = """
import os, pathlib, signal
from cnn_jax import cli, files
def main(args):
    with files.replacing(pathlib.Path("file")) as path, files.temporary_directory(pathlib.Path()) as directory:
        (directory / "large").touch()
        assert len(os.listdir()) == 2
        signal.raise_signal(signal.SIGINT)
        signal.pause()
cli.start(main)
"""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.optimized
def test_resuming_after_kills_is_bitwise_exact(tmp_path):
    """Twenty kills, at random moments of a run that writes a checkpoint most of the time and of its start."""
    uninterrupted = tmp_path / "uninterrupted"
    subprocess.run(command(uninterrupted, epochs=16), check=True, capture_output=True)
    rng = random.Random(0)
    workdir = tmp_path / "run"

    def start_or_resume():
        return command(workdir, *(["--resume"] if (workdir / "config.yaml").exists() else []), epochs=16)

    during_a_save = 0
    for _ in range(20):
        saved = finished_checkpoints(workdir)
        process = subprocess.Popen(start_or_resume(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at_the_start = rng.random() < 0.2
        while not at_the_start and finished_checkpoints(workdir) == saved:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2.0 if at_the_start else 0.3))
        process.kill()
        process.wait()
        during_a_save += any(workdir.glob("checkpoints/*tmp*"))
    subprocess.run(start_or_resume(), check=True, capture_output=True)
    assert_same_outcome(workdir, uninterrupted)
    assert during_a_save > 0
