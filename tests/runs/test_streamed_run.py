"""Runs whose images are decoded whenever they are used: the same to the bit as with images in memory-mapped files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import assert_same_outcome, stop_at
from PIL import Image

from cnn_jax import train
from cnn_jax.config import Config
from cnn_jax.data.store import ChangedImageError
from cnn_jax.data.streamed import StreamedImages
from cnn_jax.runs import evaluation_data, opening
from cnn_jax.runs.fit import StoppedError, fit, resume
from cnn_jax.runs.run import load_run
from cnn_jax.training import loop


@pytest.fixture(scope="module")
def photos(dataset, tmp_path_factory):
    """The images of the small dataset as files, in color."""
    root = tmp_path_factory.mktemp("streamed") / "photos"
    for part, split in dataset.splits.items():
        for number, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / part / dataset.class_names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([image, image // 2, 255 - image], axis=-1)).save(path)
    return root


# Three steps of a batch that is padded for two devices, with all that is random.
@pytest.fixture(scope="module")
def config(photos):
    return Config(
        dataset=f"folder:{photos}",
        epochs=3,
        batch_size=15,
        model="small",
        model_width=2,
        flip="random",
        mixup=0.2,
        shift=2,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def kept(config, tmp_path_factory):
    """The run directory with images in memory-mapped files."""
    return fit(config, tmp_path_factory.mktemp("kept") / "run", report=False).workdir


@pytest.fixture
def streamed_config(config):
    return replace(config, cache_limit=0)


def test_the_same_to_the_bit(kept, streamed_config, tmp_path):
    run = fit(streamed_config, tmp_path / "run")
    assert_same_outcome(run.workdir, kept)
    assert run.data_sha256 == load_run(kept).data_sha256
    assert run.task == load_run(kept).task
    summary = json.loads((run.workdir / "summary.json").read_text())
    assert 0 <= summary["input_wait_seconds"] <= summary["train_seconds"]
    assert "Waiting for images" in (run.workdir / "report.html").read_text()


@pytest.mark.parametrize("call", [1, 3])
def test_stopped_and_resumed_either_way(kept, config, streamed_config, tmp_path, call, monkeypatch):
    monkeypatch.setattr(loop, "MAX_CHUNK_STEPS", 1)
    for first, second in ((streamed_config, config), (config, streamed_config), (streamed_config, streamed_config)):
        workdir = tmp_path / f"{first.cache_limit}-{second.cache_limit}"
        with pytest.raises(StoppedError):
            fit(first, workdir, report=False, stop_requested=stop_at(call))
        resume(workdir, report=False, cache_limit=second.cache_limit)
        assert_same_outcome(workdir, kept)


def test_evaluated_and_exported(kept, streamed_config, tmp_path):
    run = load_run(kept)
    _, dataset = evaluation_data.load(run)
    streamed = replace(run, config=streamed_config)
    _, streamed_dataset = evaluation_data.load(streamed)
    assert isinstance(streamed_dataset.test.images, StreamedImages)
    np.testing.assert_array_equal(run.evaluate(dataset).logits, streamed.evaluate(streamed_dataset).logits)
    assert streamed.export(tmp_path / "weights.safetensors", "safetensors").num_images == len(dataset.test)


def test_scored_on_another_folder(kept, streamed_config, photos, caplog):
    """All its images are scored, among which those of training are counted."""
    _, dataset = evaluation_data.load(replace(load_run(kept), config=streamed_config), f"folder:{photos / 'train'}")
    assert isinstance(dataset.test.images, StreamedImages)
    assert len(dataset.test) == 47
    assert "47 of the 47 test images are among the run's training images: the accuracy is too high" in caplog.messages


def test_an_image_that_disappears_in_training(kept, streamed_config, photos, tmp_path, monkeypatch, capsys):
    """Training stops with one line that says how to continue, and nothing that was computed is lost."""
    path = next((photos / "train" / "top").iterdir())
    content = path.read_bytes()
    monkeypatch.setattr(opening, "Trainer", lambda *args: loop.Trainer(*args, max_chunk_steps=1))

    def remove(report):
        if (report.epoch, report.steps_done) == (1, 0):
            path.unlink(missing_ok=True)

    with pytest.raises(ChangedImageError) as caught:
        fit(replace(streamed_config, checkpoint_every=None), tmp_path / "run", report=False, on_chunk=remove)
    assert str(caught.value) == (
        f"cannot read {path}: No such file or directory, and is decoded whenever it is used: restore it, then continue "
        f"with python -m cnn_jax.train --resume --workdir {tmp_path / 'run'}"
    )
    steps = sorted(int(step.name) for step in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps[-1] > 4  # in the second epoch
    with pytest.raises(Exception, match="the dataset changed since the run"):
        resume(tmp_path / "run", report=False)
    path.write_bytes(content)
    resume(tmp_path / "run", report=False)
    assert_same_outcome(tmp_path / "run", kept)


def test_the_flag(photos, tmp_path, capsys):
    words = ("--dataset", f"folder:{photos}", "--epochs", "1", "--workdir", str(tmp_path / "run"))
    assert train.main([*words, "--cache-limit", "1e-6"]) == 0
    assert load_run(tmp_path / "run").config.cache_limit == 1e-6
