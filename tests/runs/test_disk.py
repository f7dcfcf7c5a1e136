"""Full, read-only and vanished disks: one error, and what was saved before is kept."""

import contextlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from helpers import CONFIG, assert_same_outcome, wait_until_trained

from cnn_jax.errors import CnnJaxError, UsageError


def wait_until_saved(workdir, step):
    while not (workdir / "checkpoints" / str(step) / "sha256sums").exists():
        time.sleep(0.01)


def fill(disk):
    free = shutil.disk_usage(disk).free
    # A process that is saving may take the room first.
    with contextlib.suppress(OSError), (disk / "filler").open("ab") as file:
        file.write(bytes(max(0, free - 20_000)))


def use_up_inodes(disk):
    with contextlib.suppress(OSError):
        for number in range(1_000_000):
            (disk / str(number)).touch()


def turn_read_only(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


@pytest.mark.parametrize(
    ("break_disk", "reason"),
    [
        (fill, "No space left on device"),
        (use_up_inodes, "No space left on device"),
        (turn_read_only, "Read-only file system"),
    ],
)
def test_failed_save_keeps_the_earlier_checkpoints(
    train, continue_run, tmp_path, uninterrupted, small_disk, break_disk, reason
):
    def on_epoch(record):
        if record.epoch == 1:
            wait_until_saved(small_disk / "run", record.step)  # so that the next checkpoint fails
            break_disk(small_disk)

    with pytest.raises(CnnJaxError, match=rf"cannot write .*{reason}.*: fix this, then rerun with --resume"):
        train(CONFIG, small_disk / "run", on_epoch=on_epoch)
    shutil.copytree(small_disk / "run", tmp_path / "run")
    continue_run(CONFIG, tmp_path / "run")
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_vanished_directory_is_an_error(train, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(CnnJaxError, match=r"cannot write .*(metrics\.jsonl|checkpoint).*: fix this, then rerun"):
        train(CONFIG, workdir, on_epoch=lambda record: workdir.rename(tmp_path / "elsewhere"))


def test_read_only_directory_is_refused(train, read_only_disk):
    with pytest.raises(
        UsageError, match=r"cannot write the run directory .* \(Read-only file system\): choose another"
    ):
        train(CONFIG, read_only_disk / "run")


@pytest.mark.parametrize("break_disk", [fill, lambda disk: (disk / "run").rename(disk / "elsewhere")])
def test_process_reports_a_failed_save_on_one_line(small_disk, break_disk):
    """Without the tracebacks of the threads that save."""
    workdir = small_disk / "run"
    flags = ["--dataset=digits", "--epochs=1000", "--batch-size=40", "--checkpoint-every=3", "--workdir", workdir]
    words = [sys.executable, "-m", "cnn_jax.train", *flags]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until_trained(workdir, process)
            break_disk(small_disk)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    dataset, error = err.splitlines()
    assert dataset.startswith("digits: ")
    assert re.fullmatch(r"error: cannot write .*: fix this, then rerun with --resume", error)
