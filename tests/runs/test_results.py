"""Runs loaded and evaluated for a comparison: which test images they share, and why they may not be evaluated."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import stop_at
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Split
from cnn_jax.errors import UsageError
from cnn_jax.runs import results
from cnn_jax.runs.fit import StoppedError, fit
from cnn_jax.runs.results import load_results, short_names
from cnn_jax.runs.run import load_run
from cnn_jax.training.comparison import ImageResults, compare
from cnn_jax.training.mcnemar import PairedCounts

CONFIG = Config(epochs=2, batch_size=10, dataset="squares", seed=3)


@pytest.fixture
def squares(dataset, monkeypatch):
    """What ``data.load`` returns for the name ``squares``, and the configs that it was called with."""
    loaded = {"squares": dataset}
    load, calls = data.load, []

    def spy(config):
        calls.append(config)
        return loaded.get(config.dataset) or load(config)

    monkeypatch.setattr(data, "load", spy)
    return loaded, calls


@pytest.fixture(scope="module")
def two(train, tmp_path_factory):
    """Two runs with different seeds; not to be changed."""
    root = tmp_path_factory.mktemp("two")
    return [train(dataclasses.replace(CONFIG, seed=seed), root / f"seed{seed}").workdir for seed in (3, 4)]


def test_results_are_those_of_the_evaluation(two, squares, dataset):
    for result, workdir, seed in zip(load_results(two), two, (3, 4), strict=True):
        run = load_run(workdir)
        evaluation = run.evaluate(dataset)
        np.testing.assert_array_equal(result.images.correct, evaluation.labels == evaluation.predictions)
        assert (result.test_accuracy, result.test_loss) == (evaluation.accuracy, evaluation.loss)
        assert (result.name, result.workdir, result.step) == (f"seed{seed}", workdir, 10)
        assert (result.config, result.history, result.class_names) == (run.config, run.history, dataset.class_names)
        assert (result.image_shape, result.data_sha256) == (dataset.image_shape, dataset.sha256)
        summary = json.loads((workdir / "summary.json").read_text())
        for name in ("compile_seconds", "backend", "device", "device_count", "versions", "num_parameters"):
            assert getattr(result, name) == summary[name]
        assert result.train_seconds == pytest.approx(summary["train_seconds"])


def test_data_that_runs_share_is_loaded_once(two, squares, tmp_path):
    load_results([*two, shutil.copytree(two[0], tmp_path / "copy")])
    assert len(squares[1]) == 1


def test_the_test_split_is_shared_whatever_is_held_out(two, train, squares, tmp_path, dataset, monkeypatch):
    held_out = data.with_validation(dataset, 0.3, 0)
    load = data.load
    monkeypatch.setattr(data, "load", lambda config: held_out if config.validation_fraction else load(config))
    workdir = train(dataclasses.replace(CONFIG, validation_fraction=0.3), tmp_path / "run").workdir
    comparison = compare(load_results([two[0], workdir]))
    assert len(comparison.pairs[0].counts) == len(dataset.test)
    assert comparison.differences.keys() == {"validation_fraction", "data_sha256"}


def test_data_that_has_changed_since_training_is_not_used(two, squares, dataset):
    test = Split(255 - dataset.test.images, dataset.test.labels)
    squares[0]["squares"] = dataclasses.replace(dataset, test=test)
    comparison = compare(load_results(two))
    assert comparison.runs[0].images == "squares is not the data that it was trained on, or has changed since"
    assert comparison.pairs[0].counts == "seed3 was not evaluated"
    assert comparison.runs[0].test_accuracy == load_run(two[0]).history[-1].test_accuracy  # as recorded


def test_data_that_cannot_be_loaded(two, squares):
    del squares[0]["squares"]
    first, _ = load_results(two)
    assert first.images.startswith("unknown dataset 'squares'")
    assert first.test_loss == json.loads((two[0] / "summary.json").read_text())["test_loss"]


@pytest.mark.parametrize(("number", "step", "epochs"), [(1, 3, 0), (2, 5, 1)])
def test_a_run_that_was_stopped(train, squares, tmp_path, two, number, step, epochs):
    config = dataclasses.replace(CONFIG, checkpoint_every=3)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", stop_requested=stop_at(number))
    _, stopped = load_results([two[0], tmp_path / "run"])
    assert (stopped.step, len(stopped.history)) == (step, epochs)
    assert isinstance(stopped.images, ImageResults)
    assert (stopped.device, stopped.compile_seconds, stopped.versions) == (None, None, {})
    del squares[0]["squares"]
    _, stopped = load_results([two[0], tmp_path / "run"])
    assert stopped.test_accuracy == (stopped.history[0].test_accuracy if step == 5 else None)


def test_the_summary_of_fewer_epochs_is_not_that_of_the_checkpoint(two, squares, tmp_path):
    run = shutil.copytree(two[0], tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 5, "test_accuracy": 0.125}))
    del squares[0]["squares"]
    assert load_results([run, two[1]])[0].test_accuracy == load_run(run).history[-1].test_accuracy != 0.125


@pytest.mark.parametrize(
    "content", ["", "[1", "[]", "{}", "9" * 5000, "[" * 50_000, '{"test_accuracy": "high"}', "x" * 100_001, b"\xff"]
)
def test_a_summary_that_is_damaged_is_ignored_with_a_warning(two, squares, tmp_path, caplog, content):
    run = shutil.copytree(two[0], tmp_path / "run")
    (run / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    result, _ = load_results([run, two[1]])
    assert (result.device, result.test_accuracy) == (None, load_run(run).history[-1].test_accuracy)
    (message,) = caplog.messages
    assert message.startswith(f"{run / 'summary.json'} is ignored, because it cannot be read (")
    assert "\n" not in message
    assert len(message) < 500


def test_a_summary_that_is_a_link_is_not_followed(two, squares, tmp_path, caplog):
    run = shutil.copytree(two[0], tmp_path / "run")
    (run / "summary.json").rename(tmp_path / "elsewhere")
    (run / "summary.json").symlink_to(tmp_path / "elsewhere")
    assert load_results([run, two[1]])[0].device is None
    assert "is ignored" in caplog.text


def test_the_test_loss_may_be_infinite(two, squares, tmp_path):
    run = shutil.copytree(two[0], tmp_path / "run")
    text = (run / "summary.json").read_text()
    (run / "summary.json").write_text(text.replace('"test_loss": ', '"test_loss": Infinity, "before": '))
    del squares[0]["squares"]
    assert load_results([run, two[1]])[0].test_loss == np.inf


def test_what_is_not_two_runs(two, train, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"/seed4/\.\./seed3 is named twice: name each run once"):
        load_results([two[0], two[1], two[1] / ".." / "seed3"])
    (tmp_path / "link").symlink_to(two[0])
    with pytest.raises(UsageError, match="is named twice"):
        load_results([two[0], tmp_path / "link"])
    with pytest.raises(UsageError, match=f"{tmp_path} is not a run directory"):
        load_results([two[0], tmp_path])
    with pytest.raises(StoppedError):
        train(CONFIG, tmp_path / "new", stop_requested=lambda: True)
    with pytest.raises(UsageError, match=f"{tmp_path / 'new'} has no trained network: continue it with"):
        load_results([two[0], tmp_path / "new"])
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    with pytest.raises(UsageError, match="contains no checkpoint: train the run first"):
        load_results([two[0], tmp_path / "new"])


def test_short_names(tmp_path):
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert short_names([tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "b"]) == [
        "x/run",
        "y/run",
        "y/b",
    ]
    assert short_names([tmp_path, tmp_path.parent]) == [tmp_path.name, tmp_path.parent.name]
    assert short_names([tmp_path / "a", tmp_path / "b" / "a"]) == [f"{tmp_path.name}/a", "b/a"]


# Folders of images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of two classes of 40 images."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    rng = np.random.default_rng(0)
    for name, level in {"cat": 90, "dog": 140}.items():
        (root / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.normal(level, 40, (16, 16)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def on_photos(photos, tmp_path_factory):
    """Runs on the folder, with another split and with larger images; not to be changed."""
    root = tmp_path_factory.mktemp("runs")
    config = Config(dataset=f"folder:{photos}", epochs=1, batch_size=20)
    changes = {"plain": {}, "split": {"split_seed": 2}, "large": {"image_size": (20, 20)}}
    return {
        name: fit(dataclasses.replace(config, **settings), root / name, report=False).workdir
        for name, settings in changes.items()
    }


def test_runs_with_different_splits_share_the_images_that_neither_was_trained_on(on_photos):
    runs = [on_photos["plain"], on_photos["split"]]
    first, second = (data.load(load_run(run).config) for run in runs)
    common = set(first.test.files) & set(second.test.files)
    assert 0 < len(common) < min(len(first.test), len(second.test))
    assert not common & {*first.train.files, *second.train.files}
    correct = []
    for run, dataset in zip(runs, (first, second), strict=True):
        evaluation = load_run(run).evaluate(dataset)
        right = dict(zip(dataset.test.files, evaluation.labels == evaluation.predictions, strict=True))
        correct.append(np.array([right[name] for name in sorted(common)]))
    (pair,) = compare(load_results(runs)).pairs
    assert pair.counts == PairedCounts.of(*correct)


def test_runs_with_images_of_different_sizes_share_the_files(on_photos):
    comparison = compare(load_results([on_photos["plain"], on_photos["large"]]))
    assert len(comparison.pairs[0].counts) == len(comparison.runs[0].images.correct) > 0
    assert comparison.differences.keys() == {"image_size", "image_shape", "data_sha256"}


def test_a_folder_that_has_moved(photos, on_photos, tmp_path):
    runs = [on_photos["plain"], on_photos["large"]]
    counts = compare(load_results(runs)).pairs[0].counts
    moved = photos.rename(tmp_path / "moved")
    try:
        assert load_results(runs)[0].images.startswith(f"cannot read the folder {photos}: No such file or directory")
        assert compare(load_results(runs, dataset=f"folder:{moved}")).pairs[0].counts == counts
        other = shutil.copytree(moved, tmp_path / "other")
        next(other.rglob("*.png")).unlink()
        reason = load_results(runs, dataset=f"folder:{other}")[0].images
        assert reason == f"folder:{other} is not the data that it was trained on, or has changed since"
    finally:
        moved.rename(photos)


def test_digests_tell_pixels_and_classes_apart(dataset):
    digests = results._digests(dataset)
    assert len(set(digests)) == len(dataset.test)
    other = dataclasses.replace(dataset, class_names=("top", "middle", "low"))
    same = [a == b for a, b in zip(digests, results._digests(other), strict=True)]
    np.testing.assert_array_equal(same, dataset.test.labels != 2)
