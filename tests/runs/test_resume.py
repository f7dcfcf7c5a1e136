"""Resuming a run: bitwise exact from anywhere, and refused if it would be another run."""

import dataclasses
import json
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import CONFIG, assert_same_outcome, assert_same_state, finished_checkpoints, stop_at

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Split
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.fit import StoppedError, fit, resume
from cnn_jax.runs.run import load_run

MAY_CHANGE = {
    "skip_unreadable",
    "epochs",
    "data_dir",
    "cache_limit",
    "target_accuracy",
    "checkpoint_every",
    "tensorboard",
}


# The stops are before the first step, inside an epoch, between two epochs, and inside the second.
@pytest.mark.parametrize("call", [0, 1, 2, 3, 7])
def test_resuming_is_bitwise_exact(train, continue_run, tmp_path, uninterrupted, call):
    with pytest.raises(StoppedError, match=r"stopped after step \d+: continue with python -m cnn_jax\.train --resume"):
        train(CONFIG, tmp_path / "parts", stop_requested=stop_at(call))
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", uninterrupted)


@pytest.mark.optimized
def test_resuming_optimized_programs_is_bitwise_exact(train, continue_run, tmp_path):
    train(CONFIG, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path / "parts", stop_requested=stop_at(3))
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("epochs", [1, 3])
def test_training_for_more_epochs_is_bitwise_exact(train, continue_run, tmp_path, uninterrupted, epochs):
    train(dataclasses.replace(CONFIG, epochs=epochs), tmp_path / "parts")
    resumed = []
    continue_run(CONFIG, tmp_path / "parts", on_epoch=resumed.append)
    assert [record.epoch for record in resumed] == list(range(epochs, 4))
    assert_same_outcome(tmp_path / "parts", uninterrupted)


def test_resuming_a_finished_run_changes_nothing(continue_run, finished):
    before = load_run(finished)
    again = continue_run(CONFIG, finished)
    assert again.history == before.history
    assert_same_state(again.state, before.state)


def test_stopped_while_writing_the_report_it_can_be_resumed(continue_run, finished, uninterrupted):
    """The stop is requested before the evaluation, before each file of the report, and at the end."""
    report = ["curves.png", "confusion.png", "report.html"]
    for call, written in enumerate([[], [], report[:1], report[:2], report]):
        with pytest.raises(StoppedError, match=r"after step 20: continue with python -m cnn_jax\.train --resume"):
            continue_run(CONFIG, finished, report=True, stop_requested=stop_at(call))
        assert [name for name in report if (finished / name).exists()] == written
        for name in written:
            (finished / name).unlink()
    continue_run(CONFIG, finished, report=True)
    assert_same_outcome(finished, uninterrupted)
    assert {path.name for path in finished.iterdir()} == {path.name for path in uninterrupted.iterdir()} | set(report)


def test_seconds_before_a_stop_count(train, continue_run, tmp_path):
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path, stop_requested=stop_at(3))
    (checkpoint,) = (path.parent for path in tmp_path.glob("checkpoints/6/sha256sums"))
    meta = json.loads((checkpoint / "meta/metadata").read_text())
    meta["epoch_seconds"] += 1000
    (checkpoint / "meta/metadata").write_text(json.dumps(meta))
    files = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    sums = subprocess.run(["sha256sum", *files], cwd=checkpoint, capture_output=True, text=True, check=True).stdout
    lines = [line for line in sums.splitlines() if not line.endswith("sha256sums")]
    (checkpoint / "sha256sums").write_text("\n".join(lines) + "\n")
    assert [record.seconds > 1000 for record in continue_run(CONFIG, tmp_path).history] == [0, 1, 0, 0]


def test_half_a_line_of_metrics_is_repaired(train, continue_run, tmp_path, uninterrupted):
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path / "parts", stop_requested=stop_at(5))
    metrics = tmp_path / "parts" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 1, "st')
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", uninterrupted)


def test_files_of_an_aborted_start_do_not_prevent_training(train, tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".cnn_jax-0123456789abcdef-config.yaml").touch()
    assert len(train(dataclasses.replace(CONFIG, epochs=1), tmp_path).history) == 1
    assert not list(tmp_path.glob(".cnn_jax-*"))


LEFT_BY_A_KILL = pytest.mark.parametrize("left", [[], ["0.orbax-checkpoint-tmp"], ["0"]])


@pytest.fixture
def killed_early(uninterrupted, tmp_path, left):
    """A run directory whose process was killed before its first checkpoint was written."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(uninterrupted / "config.yaml", workdir)
    for name in left:
        (workdir / "checkpoints" / name).mkdir(parents=True)
    (workdir / ".lock").touch()
    return workdir


@LEFT_BY_A_KILL
def test_run_killed_before_its_first_checkpoint_can_be_resumed(continue_run, killed_early, uninterrupted):
    continue_run(CONFIG, killed_early)
    assert_same_outcome(killed_early, uninterrupted)


@LEFT_BY_A_KILL
def test_run_killed_before_its_first_checkpoint_can_be_started_again(train, killed_early, tmp_path):
    """With other settings too, because nothing was trained."""
    config = dataclasses.replace(CONFIG, seed=4, epochs=1)
    run = train(config, killed_early)
    assert run.config.seed == load_run(killed_early).config.seed == 4
    train(config, tmp_path / "fresh")
    assert_same_outcome(killed_early, tmp_path / "fresh")


def test_settings_are_written_before_the_first_checkpoint(train, tmp_path, monkeypatch):
    monkeypatch.setattr("cnn_jax.runs.recorder.CheckpointWriter", mock.Mock(side_effect=CnnJaxError("no room")))
    with pytest.raises(CnnJaxError, match="no room"):
        train(CONFIG, tmp_path)
    assert Config.from_yaml(tmp_path / "config.yaml") == CONFIG
    assert not (tmp_path / "checkpoints").exists()


def test_run_interrupted_while_compiling_can_be_resumed(train, continue_run, tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        # Not by a signal: Ctrl-C is ignored where tests run in the background.
        patch.setattr("cnn_jax.training.loop.Trainer.compile", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, tmp_path / "parts")
    continue_run(CONFIG, tmp_path / "parts")
    assert_same_outcome(tmp_path / "parts", uninterrupted)


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(Config)])
def test_settings_that_determine_the_result_may_not_change(continue_run, finished, setting):
    other = {
        "epochs": 5,
        "batch_size": 11,
        "learning_rate": 0.02,
        "dataset": "circles",
        "data_dir": "elsewhere",
        "cache_limit": 1.0,
        "image_size": (16, 16),
        "channels": 1,
        "fit": "stretch",
        "skip_unreadable": True,
        "precision": "bfloat16",
        "shuffle": False,
        "normalize": False,
        "model": "other",
        "init_from": "torchvision:resnet18",
        "seed": 4,
        "target_accuracy": 0.1,
        "validation_fraction": 0.2,
        "split_seed": 1,
        "checkpoint_every": 2,
        "deterministic": True,
        "tensorboard": True,
        "patience": 3,
        "model_depth": 9,
        "model_width": 9,
        "model_dropout": 0.1,
        "freeze": "backbone",
        "tta": "flip",
        "flip": "random",
        "shift": 1,
        "random_resized_crop": 0.5,
        "random_erasing": 0.1,
        "color_jitter": 0.1,
        "mixup": 0.2,
        "cutmix": 0.2,
        "optimizer": "sgd",
        "schedule": "linear",
        "warmup": "1 epoch",
        "weight_decay": 0.1,
        "momentum": 0.8,
        "clip_norm": 1.0,
        "accumulate": 2,
        "average_decay": 0.9,
        "backbone_rate": 0.1,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
    }
    changed = dataclasses.replace(CONFIG, **{setting: other[setting]})
    # What is wrong even in a new run is said first.
    wrong = {
        "model": "unknown model 'other'",
        "weight_decay": "adam has no weight decay",
        "patience": "needs a validation set",
        "freeze": "name trained ones with --init-from",
        **{f"model_{option}": f"the network cnn has no --model-{option}" for option in ("depth", "width", "dropout")},
    }
    if setting in MAY_CHANGE - wrong.keys():
        assert continue_run(changed, finished).history
    else:
        message = wrong.get(setting, f"trained with other settings: {setting} was")
        with pytest.raises(UsageError, match=message):
            continue_run(changed, finished)


def test_all_changed_settings_are_named(continue_run, finished):
    other = dataclasses.replace(CONFIG, dataset="circles", batch_size=20)
    with pytest.raises(UsageError, match=r"dataset was squares and is now circles, batch_size was 10 and is now 20"):
        continue_run(other, finished)


def test_other_settings_are_refused_before_the_data_is_read(finished, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: pytest.fail("the data was read"))
    with pytest.raises(UsageError, match="batch_size was 10 and is now 20"):
        resume(finished, batch_size=20)


def test_fewer_epochs_than_started_are_refused(train, continue_run, tmp_path):
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path, stop_requested=stop_at(3))
    with pytest.raises(UsageError, match="was trained for longer: --epochs must be at least 2"):
        continue_run(dataclasses.replace(CONFIG, epochs=1), tmp_path)


def test_changed_dataset_is_refused(continue_run, finished, dataset):
    """The number and the shape of the images are the same, but a class has another name, or a label is another."""
    labels = dataset.train.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    for changed in (
        dataclasses.replace(dataset, class_names=("top", "middle", "below")),
        dataclasses.replace(dataset, train=Split(dataset.train.images, labels)),
        dataclasses.replace(dataset, test=Split(dataset.test.images, np.roll(dataset.test.labels, 1))),
        dataclasses.replace(dataset, test=Split(255 - dataset.test.images, dataset.test.labels)),
    ):
        with pytest.raises(UsageError, match=r"the dataset changed since the run in .* was trained"):
            continue_run(CONFIG, finished, dataset=changed)


def test_resuming_on_other_devices_warns(train, continue_run, tmp_path, caplog, uninterrupted):
    workdir = tmp_path / "run"
    train(dataclasses.replace(CONFIG, epochs=1), workdir, devices=jax.devices()[:1])
    assert json.loads((workdir / "summary.json").read_text())["device_count"] == 1
    resumed = continue_run(dataclasses.replace(CONFIG, epochs=2), workdir)
    assert "was trained on 1 device(s) and is resumed on 2 device(s): results agree up to rounding" in caplog.text
    assert json.loads((workdir / "summary.json").read_text())["device_count"] == 2
    assert resumed.history[-1].loss == pytest.approx(load_run(uninterrupted).history[1].loss, rel=1e-4)


def test_run_that_another_process_started_meanwhile_is_kept(tmp_path, uninterrupted, dataset, monkeypatch):
    def load_slowly(config):
        shutil.copytree(uninterrupted, tmp_path / "run")
        return dataset

    monkeypatch.setattr(data, "load", load_slowly)
    with pytest.raises(UsageError, match="contains a run"):
        fit(dataclasses.replace(CONFIG, seed=4), tmp_path / "run")
    assert_same_outcome(tmp_path / "run", uninterrupted)


def test_second_process_is_refused(continue_run, finished):
    hold = f"""
import fcntl, signal
file = open({str(finished / ".lock")!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
signal.pause()
"""
    saved = finished_checkpoints(finished)
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        try:
            holder.stdout.readline()
            with pytest.raises(UsageError, match="another process is training in"):
                continue_run(dataclasses.replace(CONFIG, epochs=5), finished)
        finally:
            holder.kill()
    assert finished_checkpoints(finished) == saved
    continue_run(CONFIG, finished)  # a killed process does not keep the lock


@pytest.mark.usefixtures("finished")
def test_lost_checkpoints_are_an_error(continue_run, tmp_path):
    workdir = tmp_path / "lost"
    workdir.mkdir()
    (workdir / "config.yaml").write_text(CONFIG.to_yaml())
    (workdir / "metrics.jsonl").touch()  # written after the first checkpoint
    for read in (load_run, lambda workdir: continue_run(CONFIG, workdir)):
        with pytest.raises(UsageError, match="contains no checkpoint"):
            read(workdir)


def test_directory_without_a_run_is_refused(continue_run, tmp_path):
    for read in (load_run, lambda workdir: continue_run(CONFIG, workdir)):
        with pytest.raises(UsageError, match="is not a run directory"):
            read(tmp_path)
