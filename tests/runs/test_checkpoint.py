"""Checkpoints: which one is read, what damage does, and when one counts as written."""

import dataclasses
import json
import os
import subprocess
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import CONFIG, assert_same_outcome, assert_same_state

from cnn_jax.errors import CnnJaxError
from cnn_jax.runs import metadata
from cnn_jax.runs.checkpoint import CheckpointWriter
from cnn_jax.runs.run import load_run
from cnn_jax.training.loop import Trainer


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


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("part", ["state", "meta", "metrics", "sha256sums"])
def test_damaged_newest_checkpoint_is_skipped(finished, caplog, part, how):
    newest = finished / "checkpoints" / "20"
    damage(newest / part if part == "sha256sums" else largest_file(newest / part), how)
    assert load_run(finished).state.step == 18
    assert ("is damaged and ignored" in caplog.text) == ((part, how) != ("sha256sums", "missing"))


def test_damaged_best_checkpoint_is_skipped(finished, caplog):
    best = int(load_run(finished, "best").state.step)
    damage(largest_file(finished / f"checkpoints/{best}/state"), "flipped")
    assert load_run(finished, "best").state.step != best
    assert f"checkpoints/{best} is damaged and ignored" in caplog.text


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_resuming_from_an_older_checkpoint_is_bitwise_exact(finished, uninterrupted, continue_run, caplog, how):
    damage(largest_file(finished / "checkpoints/20/state"), how)
    continue_run(CONFIG, finished)
    assert caplog.text.count("is damaged and ignored") == 1
    assert_same_outcome(finished, uninterrupted)


def test_damaged_checkpoints_are_kept_until_the_second_resume(finished, continue_run):
    (finished / "checkpoints/20/sha256sums").write_text("no sums\n")
    continue_run(CONFIG, finished)
    names = {path.name.rstrip("0123456789") for path in (finished / "checkpoints").iterdir()}
    assert names == {"", "damaged-20-"}
    continue_run(dataclasses.replace(CONFIG, epochs=5), finished)
    assert all(path.name.isdecimal() for path in (finished / "checkpoints").iterdir())


def test_all_checkpoints_damaged_is_an_error(finished, continue_run):
    for sums in finished.glob("checkpoints/*/sha256sums"):
        sums.write_text("no sums\n")
    for read in (load_run, lambda workdir: continue_run(CONFIG, workdir)):
        with pytest.raises(CnnJaxError, match=r"every checkpoint in .* is damaged: start a new run"):
            read(finished)


def test_checkpoint_inside_an_epoch_is_never_the_best(uninterrupted):
    assert int(load_run(uninterrupted, "best").state.step) in {5, 10, 15, 20}


def test_newest_and_best_are_kept(train, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=12, learning_rate=0.03, checkpoint_every=None)
    run = train(config, tmp_path)
    accuracies = [record.test_accuracy for record in run.history]
    best = max(range(12), key=lambda epoch: (accuracies[epoch], epoch))
    assert load_run(tmp_path).history[-1].epoch == 11
    assert load_run(tmp_path, "best").history[-1].epoch == best
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {5 * 11, 5 * 12, 5 * (best + 1)}


def test_the_best_is_not_chosen_by_the_accuracy_on_training_examples(train, tmp_path, monkeypatch):
    """That one rises, while the other falls."""
    evaluate = Trainer.evaluate

    def evaluate_falling(self, state, split):
        score, logits = evaluate(self, state, split)
        return score._replace(accuracy=1 / (1 + int(state.step))), logits

    monkeypatch.setattr(Trainer, "evaluate", evaluate_falling)
    first, *_, last = train(CONFIG, tmp_path).history
    assert first.train_accuracy < last.train_accuracy
    assert load_run(tmp_path, "best").history == (first,)


# TensorStore reports files that vanish while it reads them, besides the error that it raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_can_be_read_while_training_replaces_them(finished, continue_run, caplog):
    config = dataclasses.replace(CONFIG, epochs=10, checkpoint_every=1)
    training = threading.Thread(target=continue_run, args=(config, finished))
    training.start()
    loaded = []
    while training.is_alive():
        loaded.append(int(load_run(finished, "best" if len(loaded) % 4 == 0 else "newest").state.step))
    training.join()
    assert len(set(loaded)) > 3, "nothing was saved meanwhile"
    assert loaded[-1] <= load_run(finished).state.step == 50
    assert "damaged" not in caplog.text


def test_files_reach_the_disk_before_their_checksums(train, tmp_path, monkeypatch):
    """After a power failure, no checksums exist without the complete files."""
    synced = []
    fsync = os.fsync

    def record(descriptor):
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    train(dataclasses.replace(CONFIG, epochs=1, checkpoint_every=None), tmp_path)
    checkpoint = tmp_path / "checkpoints" / "5"
    (sums,) = (path for path in synced if path.endswith("sha256sums") and Path(path).parent == checkpoint)
    before = synced[: synced.index(sums)]
    after = synced[synced.index(sums) :]
    assert {str(path) for path in checkpoint.rglob("*")} - {str(checkpoint / "sha256sums")} <= set(before)
    assert [str(checkpoint), str(checkpoint.parent)] == after[1:3]
    assert any(path.endswith("-config.yaml") for path in synced)


def test_saving_an_earlier_step_is_an_error(tmp_path, uninterrupted):
    state = load_run(uninterrupted).state
    with CheckpointWriter(tmp_path) as checkpoints:
        checkpoints.save(state, {}, None)
        checkpoints.save(state.replace(step=state.step - 1), {}, None)
        with pytest.raises(CnnJaxError, match=r"cannot write a checkpoint .*File exists"):
            checkpoints.wait()


def test_saved_state_is_a_copy(uninterrupted, tmp_path, monkeypatch):
    """The next step reuses the memory of a state while it is written."""
    write, overwritten = CheckpointWriter._write, threading.Event()
    monkeypatch.setattr(CheckpointWriter, "_write", lambda *args: overwritten.wait(timeout=10) and write(*args))
    expected = load_run(uninterrupted).state
    saved = json.loads((uninterrupted / "checkpoints/20/meta/metadata").read_text())
    state = jax.tree.map(np.array, expected)
    with CheckpointWriter(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, saved, None)
        for leaf in jax.tree.leaves((state.params, state.opt_state)):
            leaf.fill(0)
        overwritten.set()
    assert_same_state(load_run(tmp_path).state, expected)


def test_checksums_can_be_checked_with_sha256sum(uninterrupted):
    words = ["sha256sum", "--check", "--quiet", "sha256sums"]
    assert subprocess.run(words, cwd=uninterrupted / "checkpoints/20", check=False).returncode == 0


def test_checkpoints_of_another_format_are_refused(train, tmp_path, monkeypatch):
    ours = metadata.FORMAT
    monkeypatch.setattr(metadata, "FORMAT", ours + 1)
    train(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    monkeypatch.undo()
    message = f"checkpoints of format {ours + 1}, and this version of cnn_jax reads format {ours}: use the version that"
    with pytest.raises(CnnJaxError, match=message):
        load_run(tmp_path)


def assert_finite(state):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_diverged_training_keeps_the_last_good_checkpoint(train, tmp_path):
    config = dataclasses.replace(CONFIG, learning_rate=1e9, checkpoint_every=1)
    with pytest.raises(CnnJaxError, match="not finite at step 1: start a new run with a --learning-rate below 1e"):
        train(config, tmp_path)
    state = load_run(tmp_path).state
    assert state.step == 1
    assert_finite(state)


@pytest.mark.parametrize(
    "settings", [{"learning_rate": 1e9, "batch_size": 24}, {"learning_rate": 2e9, "batch_size": 47}]
)
def test_last_update_of_an_epoch_is_checked_for_finite_numbers(train, tmp_path, settings):
    with pytest.raises(CnnJaxError, match="not finite at step"):
        train(dataclasses.replace(CONFIG, epochs=2, **settings), tmp_path)
    assert_finite(load_run(tmp_path).state)
