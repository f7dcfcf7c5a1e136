"""Run directories made by an attacker: nothing outside them is read or written, nothing hangs, nothing is executed."""

import dataclasses
import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.run import load_config, load_run
from cnn_jax.runs.workdir import NAMES

CONFIG = Config(epochs=1, batch_size=10, dataset="squares", seed=3)


@pytest.fixture(scope="module")
def genuine(train, tmp_path_factory):
    return train(CONFIG, tmp_path_factory.mktemp("genuine") / "run").workdir


@pytest.fixture
def run(genuine, tmp_path):
    return shutil.copytree(genuine, tmp_path / "run")


@pytest.fixture
def victim(tmp_path):
    """A file of the user, which must not change."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


@pytest.fixture
def resume(continue_run):
    return partial(continue_run, CONFIG)


def sign(checkpoint):
    """Write checksums that match the files, following links, as an attacker would."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(checkpoint)}\n"
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != "sha256sums"
    ]
    (checkpoint / "sha256sums").write_text("".join(lines))


@pytest.mark.parametrize(
    "name", [".config.yaml", ".report.html", ".summary.json", ".metrics.jsonl", ".cnn_jax-0123456789abcdef"]
)
def test_links_under_hidden_names_are_not_followed(run, victim, name, resume):
    (run / name).symlink_to(victim)
    resume(run)


@pytest.mark.parametrize("name", NAMES)
def test_links_under_the_names_of_a_run_are_refused(run, victim, name, resume):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(victim)
    with pytest.raises(CnnJaxError, match=r"symbolic link|cannot write|cannot read|not a directory"):
        resume(run)


@pytest.mark.parametrize("split", ["train", "test"])
def test_links_to_event_files_are_refused(run, tmp_path, split, continue_run):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "events.out.tfevents.1.theirs").write_text("precious")
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / split).symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symbolic link"):
        continue_run(dataclasses.replace(CONFIG, epochs=2, tensorboard=True), run)
    assert [path.read_text() for path in elsewhere.iterdir()] == ["precious"]


def test_harmless_files_beside_the_checkpoints_are_ignored(run, resume):
    for name in (".DS_Store", "notes.txt", "05"):
        (run / "checkpoints" / name).touch()
    assert load_run(run).state.step == 5
    resume(run)
    assert {".DS_Store", "notes.txt", "05"} < {path.name for path in (run / "checkpoints").iterdir()}


def test_linked_checkpoints_are_neither_renamed_nor_removed(run, tmp_path, resume):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run / "checkpoints", elsewhere)
    (elsewhere / "7").mkdir()
    (elsewhere / "8.orbax-checkpoint-tmp").mkdir()
    before = sorted(elsewhere.rglob("*"))
    (run / "checkpoints").symlink_to(elsewhere)
    for attempt in (lambda: resume(run), lambda: load_run(run)):
        with pytest.raises(CnnJaxError, match="is not a directory"):
            attempt()
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", ["7", "damaged-1-1", "deleted", "7.orbax-checkpoint-tmp"])
def test_link_beside_the_checkpoints_is_refused(run, tmp_path, name, resume):
    elsewhere = tmp_path / "photos"
    elsewhere.mkdir()
    (elsewhere / "photo.jpg").touch()
    (run / "checkpoints" / name).symlink_to(elsewhere)
    with pytest.raises(CnnJaxError, match="is not a checkpoint: remove it"):
        resume(run)
    assert (elsewhere / "photo.jpg").exists()


def endless(path):
    path.symlink_to("/dev/zero")


def sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("plant", [os.mkfifo, endless, sparse], ids=["pipe", "endless", "sparse"])
@pytest.mark.parametrize("name", ["meta/metadata", "sha256sums", "state/manifest.ocdbt", "state/extra"])
def test_special_files_in_a_checkpoint_are_damage(run, name, plant):
    (newest,) = (path for path in (run / "checkpoints").iterdir() if path.name == "5")
    (newest / name).unlink(missing_ok=True)
    plant(newest / name)
    assert load_run(run).state.step == 0


@pytest.mark.parametrize("plant", [os.mkfifo, endless, sparse], ids=["pipe", "endless", "sparse"])
def test_special_file_as_config_is_refused(run, plant):
    (run / "config.yaml").unlink()
    plant(run / "config.yaml")
    with pytest.raises(UsageError, match=r"remove (it|the file) to use the settings in the checkpoints"):
        load_config(run)


@pytest.mark.parametrize("plant", [os.mkfifo, sparse], ids=["pipe", "sparse"])
def test_special_file_as_metrics_is_replaced(run, genuine, plant, resume):
    (run / "metrics.jsonl").unlink()
    plant(run / "metrics.jsonl")
    resume(run)
    assert (run / "metrics.jsonl").read_text() == (genuine / "metrics.jsonl").read_text()


def test_pipe_as_lock_is_refused(run, resume):
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(UsageError, match="not a regular file"):
        resume(run)


def test_linked_state_is_damage(run, tmp_path):
    newest = run / "checkpoints" / "5"
    shutil.move(newest / "state", tmp_path / "state")
    (newest / "state").symlink_to(tmp_path / "state")
    sign(newest)
    assert load_run(run).state.step == 0


def test_state_far_larger_than_its_files_is_refused_before_allocating(run):
    for checkpoint in (run / "checkpoints").iterdir():
        meta = json.loads((checkpoint / "meta/metadata").read_text())
        meta["image_shape"] = [9000, 9000, 3]
        (checkpoint / "meta/metadata").write_text(json.dumps(meta))
        sign(checkpoint)
    with pytest.raises(CnnJaxError, match="its files are too small for the expected"):
        load_run(run)


def test_checkpoints_of_other_programs_are_not_changed(tmp_path, resume, train):
    theirs = tmp_path / "run" / "checkpoints"
    for name in ("12/params", "13.orbax-checkpoint-tmp", "0.orbax-checkpoint-tmp/x"):
        (theirs / name).mkdir(parents=True)
    before = sorted(theirs.rglob("*"))
    with pytest.raises(UsageError, match="choose another --workdir"):
        train(CONFIG, tmp_path / "run")
    for attempt in (resume, load_run):
        with pytest.raises(UsageError, match="contains no checkpoint"):
            attempt(tmp_path / "run")
    assert sorted(theirs.rglob("*")) == before


def test_checkpoints_without_other_files_are_a_run(run, genuine, resume, train):
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(UsageError, match="contains a run: continue it with --resume"):
        train(CONFIG, run)
    assert load_config(run) == load_run(run).config == load_run(genuine).config
    resume(run)
    assert (run / "config.yaml").read_text() == (genuine / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [("seed", "3", "7"), ("learning_rate", "0.01", "0.09"), ("deterministic", "false", "true")],
)
def test_settings_edited_by_hand_are_refused(run, name, before, now, continue_run):
    text = (run / "config.yaml").read_text()
    assert f"{name}: {before}\n" in text
    (run / "config.yaml").write_text(text.replace(f"{name}: {before}\n", f"{name}: {now}\n"))
    with pytest.raises(UsageError, match=rf"(?i)trained with other settings: {name} was {before} and is now {now};"):
        continue_run(load_config(run), run)
    assert load_run(run).config == CONFIG


@pytest.mark.parametrize("content", [b"", b"epochs: [", b"\xff\xfe", b"sed: 3"])
def test_damaged_config_says_what_to_do(run, content):
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="remove the file to use the settings in the checkpoints"):
        load_config(run)
    (run / "config.yaml").unlink()
    assert load_config(run).seed == 3


def test_terminal_sequences_in_names_are_not_printed(run, monkeypatch):
    path = Path(str(run) + "\x1b[31m\n")
    run.rename(path)
    (path / "config.yaml").write_text("epochs: -1")
    with pytest.raises(UsageError) as error:
        load_config(path)
    assert str(error.value).isprintable()
