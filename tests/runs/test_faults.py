"""Nothing is lost: kills, signals, full and vanished disks, damaged files."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.checkpoint import CheckpointWriter
from cnn_jax.runs.fit import StoppedError, fit, resume
from cnn_jax.report import page, plots
from cnn_jax.runs.run import load_run

CONFIG = Config(epochs=4, batch_size=10, dataset="squares", seed=3, checkpoint_every=3)


@pytest.fixture
def small_data(dataset, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: dataclasses.replace(dataset, name=config.dataset))
    # Drawing takes most of the time of so small a training, and test_run looks at it.
    monkeypatch.setattr(plots, "save_curves", lambda path, *figures: path.touch())
    monkeypatch.setattr(plots, "save_confusion", lambda path, *figures: path.touch())
    monkeypatch.setattr(page, "save_page", lambda path, **figures: path.touch())


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """The run directory of a training that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with mock.patch.object(data, "load", lambda config: dataclasses.replace(dataset, name=config.dataset)):
        fit(CONFIG, workdir)
    return workdir


def continue_run(config, workdir, **options):
    """Resume with all the settings of a config, as the command does."""
    return resume(workdir, **options, **dataclasses.asdict(config))


def without_times(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [re.sub(r'"(seconds|images_per_second)": [\d.]+', "", line) for line in lines]


def assert_same_outcome(workdir, reference):
    assert without_times(workdir) == without_times(reference)
    states = (load_run(path).state for path in (workdir, reference))
    jax.tree.map(np.testing.assert_array_equal, *states)


def count_asks(workdir):
    """How often a whole training asks whether to stop."""
    asks = []
    fit(CONFIG, workdir, stop_requested=lambda: bool(asks.append(0)))
    return len(asks)


def stop_at(step):
    """A question that is answered with yes at the ``step``-th time."""
    times = iter(range(1_000_000))
    return lambda: next(times) == step


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 5, 7])
def test_stopped_anywhere_and_gone_on_with_is_the_same_to_the_bit(tmp_path, whole, small_data, asked):
    with pytest.raises(StoppedError, match=r"stopped after step \d+: continue with python -m cnn_jax\.train --resume"):
        fit(CONFIG, tmp_path / "parts", stop_requested=stop_at(asked))
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", whole)


@pytest.mark.parametrize("last", range(1, 6))
def test_stopped_while_the_report_is_written_it_says_how_to_go_on(tmp_path, whole, small_data, last):
    asked = count_asks(tmp_path / "counted") - last
    with pytest.raises(StoppedError, match=r"stopped after step 20: continue with python -m cnn_jax\.train --resume"):
        fit(CONFIG, tmp_path / "parts", stop_requested=stop_at(asked))
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", whole)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {path.name for path in whole.iterdir()}


def test_a_checkpoint_inside_an_epoch_is_never_the_best(whole):
    assert int(load_run(whole, "best").state.step) in {5, 10, 15, 20}


def test_the_seconds_before_a_stop_count(tmp_path, small_data):
    with pytest.raises(StoppedError):
        fit(CONFIG, tmp_path, stop_requested=stop_at(3))
    (checkpoint,) = (path.parent for path in tmp_path.glob("checkpoints/6/sha256sums"))
    meta = json.loads((checkpoint / "meta/metadata").read_text())
    meta["epoch_seconds"] += 1000
    (checkpoint / "meta/metadata").write_text(json.dumps(meta))
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    sums = subprocess.run(["sha256sum", *files], cwd=checkpoint, capture_output=True, text=True, check=True).stdout
    lines = [line for line in sums.splitlines() if not line.endswith("sha256sums")]
    (checkpoint / "sha256sums").write_text("\n".join(lines) + "\n")
    assert [record.seconds > 1000 for record in continue_run(CONFIG, tmp_path).history] == [0, 1, 0, 0]


def test_half_a_line_of_metrics_is_repaired(tmp_path, whole, small_data):
    with pytest.raises(StoppedError):
        fit(CONFIG, tmp_path / "parts", stop_requested=stop_at(5))
    metrics = tmp_path / "parts" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 1, "st')
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", whole)


def damage(path, how):
    content = path.read_bytes()
    match how:
        case "flipped":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "missing":
            path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("part", ["state", "meta", "metrics", "sha256sums"])
def test_the_older_checkpoint_is_used_where_the_newest_is_damaged(tmp_path, small_data, caplog, part, how):
    fit(CONFIG, tmp_path)
    newest = tmp_path / "checkpoints" / "20"
    files = [newest / part] if part == "sha256sums" else [path for path in (newest / part).rglob("*") if path.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size), how)
    assert load_run(tmp_path).state.step == 18
    assert ("is damaged and ignored" in caplog.text) == ((part, how) != ("sha256sums", "missing"))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_going_on_from_the_older_checkpoint_is_the_same_to_the_bit(tmp_path, whole, small_data, how):
    fit(CONFIG, tmp_path / "parts")
    files = (path for path in (tmp_path / "parts/checkpoints/20/state").rglob("*") if path.is_file())
    damage(max(files, key=lambda path: path.stat().st_size), how)
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", whole)


def test_damaged_checkpoints_are_kept_until_the_next_time(tmp_path, small_data):
    fit(CONFIG, tmp_path)
    (tmp_path / "checkpoints/20/sha256sums").write_text("no sums\n")
    continue_run(CONFIG, tmp_path)
    names = {path.name.rstrip("0123456789") for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"", "damaged-20-"}
    continue_run(dataclasses.replace(CONFIG, epochs=5), tmp_path)
    assert all(path.name.isdecimal() for path in (tmp_path / "checkpoints").iterdir())


# TensorStore tells of files that vanish while it reads them, besides the error that it raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_can_be_read_while_others_replace_them(tmp_path, whole, small_data, caplog):
    shutil.copytree(whole, tmp_path / "run")
    config = dataclasses.replace(CONFIG, epochs=16, checkpoint_every=1)
    training = threading.Thread(target=continue_run, args=(config, tmp_path / "run"))
    training.start()
    loaded = []
    while training.is_alive():
        loaded.append(int(load_run(tmp_path / "run", "best" if len(loaded) % 4 == 0 else "newest").state.step))
    training.join()
    assert len(set(loaded)) > 3, "nothing was saved meanwhile"
    assert loaded[-1] <= load_run(tmp_path / "run").state.step == 80
    assert "damaged" not in caplog.text


def test_a_checkpoint_counts_when_it_is_on_the_disk(tmp_path, small_data, monkeypatch):
    """After a loss of power there are the sums of no file that is not there whole."""
    synced = []
    fsync = os.fsync

    def record(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    fit(dataclasses.replace(CONFIG, epochs=1, checkpoint_every=None), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "5"
    (sums,) = (path for path in synced if path.endswith("sha256sums") and Path(path).parent == checkpoint)
    before = synced[: synced.index(sums)]
    after = synced[synced.index(sums) :]
    assert {str(path) for path in checkpoint.rglob("*")} - {str(checkpoint / "sha256sums")} <= set(before)
    assert [str(checkpoint), str(checkpoint.parent)] == after[1:3]
    assert any(path.endswith("-config.yaml") for path in synced)


def test_a_step_before_the_newest_checkpoint_is_not_silently_skipped(tmp_path, whole):
    state = load_run(whole).state
    with CheckpointWriter(tmp_path) as checkpoints:
        checkpoints.save(state, {}, None)
        checkpoints.save(state.replace(step=state.step - 1), {}, None)
        with pytest.raises(CnnJaxError, match=r"cannot write a checkpoint .*File exists"):
            checkpoints.wait()


def test_all_checkpoints_damaged_is_an_error(tmp_path, small_data):
    fit(CONFIG, tmp_path)
    for sums in tmp_path.glob("checkpoints/*/sha256sums"):
        sums.write_text("no sums\n")
    for attempt in (lambda: load_run(tmp_path), lambda: continue_run(CONFIG, tmp_path)):
        with pytest.raises(CnnJaxError, match=r"every checkpoint in .* is damaged: start a new run"):
            attempt()


def test_sums_are_what_sha256sum_checks(tmp_path, small_data):
    fit(CONFIG, tmp_path)
    checked = subprocess.run(
        ["sha256sum", "--check", "--quiet", "sha256sums"], cwd=tmp_path / "checkpoints/20", check=False
    )
    assert checked.returncode == 0


def test_another_format_is_refused_by_name(tmp_path, small_data, monkeypatch):
    monkeypatch.setattr("cnn_jax.runs.metadata.FORMAT", 5)
    fit(CONFIG, tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        CnnJaxError,
        match="has checkpoints of format 5, and this version of cnn_jax reads format 4: use the version that wrote them",
    ):
        load_run(tmp_path)


def test_numbers_that_break_keep_the_last_good_checkpoint(tmp_path, small_data):
    config = dataclasses.replace(CONFIG, learning_rate=1e9, checkpoint_every=1)
    with pytest.raises(CnnJaxError, match="not finite at step 1: start a new run with a --learning-rate below 1e"):
        fit(config, tmp_path)
    state = load_run(tmp_path).state
    assert state.step == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    "settings", [{"learning_rate": 1e9, "batch_size": 24}, {"learning_rate": 2e9, "batch_size": 47}]
)
def test_the_last_update_of_an_epoch_is_checked_too(tmp_path, small_data, settings):
    with pytest.raises(CnnJaxError, match="not finite at step"):
        fit(dataclasses.replace(CONFIG, epochs=2, **settings), tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_run(tmp_path).state.params))


def test_a_start_cut_short_is_no_obstacle(tmp_path, small_data):
    (tmp_path / ".lock").touch()
    (tmp_path / ".cnn_jax-0123456789abcdef-config.yaml").touch()
    assert len(fit(CONFIG, tmp_path).history) == 4
    assert not list(tmp_path.glob(".cnn_jax-*"))


@pytest.mark.parametrize("left", [[], ["0.orbax-checkpoint-tmp"], ["0"]])
def test_killed_before_the_first_checkpoint_it_can_be_resumed(tmp_path, whole, small_data, left):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(whole / "config.yaml", workdir)
    for name in left:
        (workdir / "checkpoints" / name).mkdir(parents=True)
    (workdir / ".lock").touch()
    shutil.copytree(workdir, tmp_path / "other")
    continue_run(CONFIG, workdir)
    assert_same_outcome(workdir, whole)
    # Or started again, with other settings: nothing was trained.
    run = fit(dataclasses.replace(CONFIG, seed=4), tmp_path / "other")
    assert run.config.seed == load_run(tmp_path / "other").config.seed == 4
    fresh = fit(dataclasses.replace(CONFIG, seed=4), tmp_path / "fresh")
    jax.tree.map(np.testing.assert_array_equal, run.state, fresh.state)


def test_the_settings_are_written_before_the_first_checkpoint(tmp_path, small_data, monkeypatch):
    def fail(directory):
        raise CnnJaxError("no room")

    monkeypatch.setattr("cnn_jax.runs.fit.CheckpointWriter", fail)
    with pytest.raises(CnnJaxError, match="no room"):
        fit(CONFIG, tmp_path)
    assert Config.from_yaml(tmp_path / "config.yaml") == CONFIG
    assert not (tmp_path / "checkpoints").exists()


def test_interrupted_while_compiling_it_can_be_gone_on_with(tmp_path, whole, small_data, monkeypatch):
    with monkeypatch.context() as patch:
        # Not by a signal: where tests run in the background, Ctrl-C's is ignored.
        patch.setattr("cnn_jax.training.loop.Trainer.compile", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(CONFIG, tmp_path / "parts")
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", whole)


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(Config)])
def test_only_some_settings_may_change(tmp_path, whole, small_data, setting):
    """What determines the result may not, whatever it is; when to stop, what to save and where data are may."""
    shutil.copytree(whole, tmp_path / "run")
    other = {
        "epochs": 5,
        "batch_size": 11,
        "learning_rate": 0.02,
        "dataset": "circles",
        "data_dir": "elsewhere",
        "image_size": (16, 16),
        "channels": 1,
        "skip_unreadable": True,
        "shuffle": False,
        "model": "other",
        "init_from": "weights.safetensors",
        "seed": 4,
        "target_accuracy": 0.1,
        "validation_fraction": 0.2,
        "split_seed": 1,
        "checkpoint_every": 2,
        "deterministic": True,
        "tensorboard": True,
    }
    changed = dataclasses.replace(CONFIG, **{setting: other[setting]})
    if setting in {"epochs", "data_dir", "target_accuracy", "checkpoint_every", "tensorboard"}:
        assert continue_run(changed, tmp_path / "run").history
    else:
        with pytest.raises(UsageError, match=f"trained with other settings: {setting} was"):
            continue_run(changed, tmp_path / "run")


def test_a_run_that_another_process_began_meanwhile_is_kept(tmp_path, whole, small_data, monkeypatch):
    load = data.load

    def load_slowly(config):
        shutil.copytree(whole, tmp_path / "run")
        return load(config)

    monkeypatch.setattr(data, "load", load_slowly)
    with pytest.raises(UsageError, match="contains a run"):
        fit(dataclasses.replace(CONFIG, seed=4), tmp_path / "run")
    assert_same_outcome(tmp_path / "run", whole)


def test_fewer_epochs_than_are_begun_is_refused(tmp_path, small_data):
    with pytest.raises(StoppedError):
        fit(CONFIG, tmp_path, stop_requested=stop_at(3))
    with pytest.raises(UsageError, match="is already in epoch 2: --epochs must be at least 2"):
        continue_run(dataclasses.replace(CONFIG, epochs=1), tmp_path)


def test_a_second_process_is_refused(tmp_path, small_data):
    fit(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    hold = f"""
import fcntl, sys, time
file = open({str(tmp_path / ".lock")!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        with pytest.raises(UsageError, match="another process is training in"):
            continue_run(CONFIG, tmp_path)
        holder.kill()
    continue_run(CONFIG, tmp_path)  # the lock of a dead process is not in the way


def test_a_directory_that_vanishes_is_one_error(tmp_path, small_data):
    workdir = tmp_path / "run"

    def vanish(record):
        workdir.rename(tmp_path / "elsewhere")

    with pytest.raises(CnnJaxError, match=r"cannot write .*(metrics\.jsonl|checkpoint).*: fix this, then rerun"):
        fit(CONFIG, workdir, on_epoch=vanish)


def wait_until_saved(workdir, step):
    while not (workdir / "checkpoints" / str(step) / "sha256sums").exists():
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 9 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m,nr_inodes=12k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_error_and_what_was_saved_is_kept(tmp_path, whole, small_disk, small_data):
    filler = small_disk / "filler"

    def fill(record):
        wait_until_saved(small_disk / "run", record.step)  # so that it is the next checkpoint that finds no room
        with filler.open("ab") as file:
            free = shutil.disk_usage(small_disk).free
            file.write(bytes(max(0, free - 20_000)))

    with pytest.raises(
        CnnJaxError, match=r"cannot write .*No space left on device.*: fix this, then rerun with --resume"
    ):
        fit(CONFIG, small_disk / "run", on_epoch=fill)
    shutil.move(small_disk / "run", tmp_path / "run")
    continue_run(CONFIG, tmp_path / "run")
    assert_same_outcome(tmp_path / "run", whole)


@pytest.fixture
def read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_read_only_directory_is_refused(read_only_disk, small_data):
    with pytest.raises(
        UsageError, match=r"cannot write the run directory .* \(Read-only file system\): choose another"
    ):
        fit(CONFIG, read_only_disk / "run")


def test_a_directory_that_turns_read_only_is_one_error_and_what_was_saved_is_kept(
    tmp_path, whole, small_disk, small_data
):
    def turn_read_only(record):
        if record.epoch == 1:
            wait_until_saved(small_disk / "run", record.step)
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    with pytest.raises(
        CnnJaxError, match=r"cannot write .*Read-only file system.*: fix this, then rerun with --resume"
    ):
        fit(CONFIG, small_disk / "run", on_epoch=turn_read_only)
    shutil.copytree(small_disk / "run", tmp_path / "run")
    continue_run(CONFIG, tmp_path / "run")
    assert_same_outcome(tmp_path / "run", whole)


def command(workdir, *words, epochs=4):
    flags = ["--dataset=digits", f"--epochs={epochs}", "--batch-size=40", "--checkpoint-every=7", "--seed=5"]
    return [sys.executable, "-m", "cnn_jax.train", *flags, "--workdir", str(workdir), *words]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    subprocess.run(command(workdir), check=True, capture_output=True)
    return workdir


def wait_for_checkpoint(workdir, process):
    """Until a step after the first is saved: training is on its way."""
    while not {path.parent.name for path in finished_checkpoints(workdir)} - {"0"}:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def start(workdir, *words, stderr):
    """A training process whose standard error is read, or closed, a full disk, or a pipe.

    The pipe is broken, because its reader is gone, or blocked, because its reader does not read and it is full.
    """
    redirection = {"full": "2>/dev/full", "closed": "2>&-"}.get(stderr, "")
    shell = ["bash", "-c", f'exec "$@" {redirection}', "bash", *command(workdir, *words)]
    process = subprocess.Popen(shell, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(workdir, process)
    if stderr == "broken":
        process.stderr.close()
        process.stderr = None
    elif stderr == "blocked":
        pipe = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while os.write(pipe, bytes(4096)):
                pass
        os.close(pipe)
    return process


@pytest.mark.parametrize(
    ("number", "status", "stderr"),
    [
        (signal.SIGTERM, 143, "read"),
        (signal.SIGINT, 130, "broken"),
        (signal.SIGTERM, 143, "closed"),
        (signal.SIGHUP, 129, "full"),
        (signal.SIGTERM, 143, "blocked"),
    ],
)
def test_asked_to_stop_it_saves_and_says_how_to_go_on(tmp_path, uninterrupted, number, status, stderr):
    workdir = tmp_path / "run"
    with start(workdir, stderr=stderr) as process:
        saved = finished_checkpoints(workdir)
        process.send_signal(number)
        try:
            status_of_process = process.wait(timeout=60)
            err = process.stderr.read() if stderr == "read" else None
        finally:
            process.kill()
    assert status_of_process == status
    assert finished_checkpoints(workdir) - saved
    assert (workdir / ".lock").read_bytes() == b"", "what was meant for standard error went into a file"
    if stderr == "read":
        resume = f"python -m cnn_jax.train --resume --workdir {workdir}"
        assert re.search(rf"stopped after step \d+: continue with {resume}\n", err)
    subprocess.run(command(workdir, "--resume"), check=True, capture_output=True)
    assert_same_outcome(workdir, uninterrupted)


@pytest.fixture
def waiting():
    """A process that has asked once whether to stop, and waits for what never comes, as in a chunk that takes long."""
    script = """
import time
from cnn_jax.cli import StopSignals
with StopSignals() as signals:
    print(signals.received(), flush=True)
    for _ in range(600):
        time.sleep(0.1)
"""
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout.readline() == "False\n"
        yield process
        process.kill()


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_asked_twice_it_stops_at_once(waiting, first, second):
    waiting.send_signal(first)
    assert waiting.stderr.readline() == "stopping after this chunk; interrupt again to stop immediately\n"
    assert waiting.poll() is None
    waiting.send_signal(second)
    assert waiting.wait(timeout=10) == 128 + second
    assert waiting.stderr.read() == "interrupted\n"


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
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


def test_temporary_files_are_removed_when_it_stops_at_once(tmp_path):
    script = """
import os, pathlib, signal, time
from cnn_jax import cli, files
def main(args):
    with files.replacing(pathlib.Path("file")) as path, files.temporary_directory(pathlib.Path()) as directory:
        (directory / "large").touch()
        assert len(os.listdir()) == 2
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)
cli.start(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


def fill(disk, workdir):
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))


def use_up_inodes(disk, workdir):
    with contextlib.suppress(OSError):
        for number in range(1_000_000):
            (disk / str(number)).touch()


def move_away(disk, workdir):
    workdir.rename(disk / "elsewhere")


@pytest.mark.parametrize("break_disk", [fill, use_up_inodes, move_away])
def test_a_save_that_fails_is_one_line(small_disk, break_disk):
    workdir = small_disk / "run"
    words = command(workdir, "--checkpoint-every=3", epochs=1000)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_checkpoint(workdir, process)
        break_disk(small_disk, workdir)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert re.fullmatch(r"error: cannot write .*: fix this, then rerun with --resume\n", err)


@pytest.mark.slow
def test_killed_at_any_moment_and_gone_on_with_is_the_same_to_the_bit(tmp_path):
    """Twenty kills, at random moments of a run that writes a checkpoint most of the time and of its start."""
    uninterrupted = tmp_path / "uninterrupted"
    subprocess.run(command(uninterrupted, epochs=16), check=True, capture_output=True)
    rng = random.Random(0)
    workdir = tmp_path / "run"
    during_a_save = 0
    for _ in range(20):
        saved = finished_checkpoints(workdir)
        process = subprocess.Popen(resuming(workdir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at_the_start = rng.random() < 0.2
        while not at_the_start and finished_checkpoints(workdir) == saved:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2.0 if at_the_start else 0.3))
        process.kill()
        process.wait()
        during_a_save += any(workdir.glob("checkpoints/*tmp*"))
    subprocess.run(resuming(workdir), check=True, capture_output=True)
    assert_same_outcome(workdir, uninterrupted)
    assert during_a_save > 0


def finished_checkpoints(workdir):
    return set(workdir.glob("checkpoints/*/sha256sums"))


def resuming(workdir):
    """The command that goes on, or begins where nothing was saved yet."""
    return command(workdir, *(["--resume"] if (workdir / "config.yaml").exists() else []), epochs=16)
