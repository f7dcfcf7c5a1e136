"""What ``fit`` leaves, and what a run can do afterwards."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import assert_same_state

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.runs.fit import fit
from cnn_jax.runs.run import load_run
from cnn_jax.training.history import reached_target

CONFIG = Config(epochs=4, batch_size=10, dataset="squares", seed=3)


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A trained network; its run directory is not to be changed."""
    return train(CONFIG, tmp_path_factory.mktemp("run") / "run")


def test_files_of_a_run(dataset, tmp_path):
    records = []
    run = fit(CONFIG, tmp_path / "run", dataset=dataset, on_epoch=records.append)
    assert tuple(records) == run.history
    assert sorted(path.name for path in run.workdir.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "confusion.png",
        "curves.png",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]
    assert Config.from_yaml(run.workdir / "config.yaml") == CONFIG
    metrics = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [record.to_json() for record in run.history]
    assert [record["step"] for record in metrics] == [5, 10, 15, 20]
    summary = json.loads((run.workdir / "summary.json").read_text())
    assert summary["test_accuracy"] == metrics[-1]["test_accuracy"]
    assert (summary["epochs"], summary["steps"], summary["dataset"]) == (4, 20, "squares")
    assert summary["train_seconds"] == pytest.approx(sum(record["seconds"] for record in metrics))
    assert summary["compile_seconds"] > 0
    assert summary["versions"].keys() == {"python", "jax", "jaxlib", "flax", "optax"}


def test_without_a_report(run):
    assert sorted(path.name for path in run.workdir.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
    ]


def test_default_workdir(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train(dataclasses.replace(CONFIG, epochs=1, dataset="tfds:emnist/letters"), None)
    assert run.workdir.parent.name == "runs"
    assert run.workdir.name.startswith("tfds-emnist-letters-cnn-20")


def test_runs_started_within_a_second_have_different_directories(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    workdirs = [train(dataclasses.replace(CONFIG, epochs=1), None).workdir.name for _ in range(2)]
    assert workdirs == ["squares-cnn-20260101-000000", "squares-cnn-20260101-000000-2"]


def test_load_run_returns_what_training_ended_with(run, dataset):
    loaded = load_run(run.workdir)
    assert_same_state(loaded.state, run.state)
    assert (loaded.history, loaded.class_names) == (run.history, dataset.class_names)
    evaluation = loaded.evaluate(dataset)
    assert evaluation.loss == run.history[-1].test_loss
    assert evaluation.accuracy == run.history[-1].test_accuracy
    assert np.mean(evaluation.labels == evaluation.predictions) == pytest.approx(evaluation.accuracy)


def test_validation_examples_are_taken_from_the_training_examples(train, tmp_path):
    """They are not trained on, and their accuracy selects the best checkpoint."""
    config = dataclasses.replace(CONFIG, epochs=1, validation_fraction=0.5)
    (record,) = train(config, tmp_path).history
    assert record.step < 5
    assert record.validation_accuracy is not None
    assert record.selection_accuracy == record.validation_accuracy


def test_results_of_a_run_with_validation_examples_are_those_on_the_test_examples(train, tmp_path, dataset):
    run = train(dataclasses.replace(CONFIG, epochs=1, validation_fraction=0.5), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    evaluation = run.evaluate(dataset)
    assert summary["test_loss"] == pytest.approx(evaluation.loss, rel=1e-5)
    assert summary["test_accuracy"] == evaluation.accuracy
    assert summary["validation_loss"] == run.history[0].validation_loss != summary["test_loss"]


def test_target_accuracy_stops_training(train, continue_run, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=50, target_accuracy=0.95, normalize=False)
    run = train(config, tmp_path)
    *before, last = [record.test_accuracy for record in run.history]
    assert last >= 0.95 > max(before)
    assert continue_run(config, tmp_path).history == run.history


def test_target_is_for_validation_examples_if_there_are_any(run):
    scores = {"train_accuracy": 1.0, "test_accuracy": None, "validation_accuracy": 0.5}
    record = dataclasses.replace(run.history[-1], **scores)
    for target, reached in ((0.5, True), (0.51, False)):
        assert reached_target(dataclasses.replace(CONFIG, target_accuracy=target), [record]) == reached


def test_second_run_compiles_nothing(run, train, tmp_path):
    """Programs are compiled for a model, and equal models share them."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **details: events.append(event))
    jax.jit(lambda x: x + 1)(0)
    compilations = sum(event.endswith("backend_compile_duration") for event in events)
    assert compilations == 1, "the listener does not receive compilations"
    train(dataclasses.replace(CONFIG, seed=4), tmp_path / "second")
    assert sum(event.endswith("backend_compile_duration") for event in events) == compilations


# What is refused


def test_directory_in_use_is_refused_and_kept(train, tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UsageError, match="exists and is not a run directory: choose another --workdir"):
        train(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_directory_that_cannot_be_created_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the run directory .* \(Not a directory\): choose another"):
        train(CONFIG, tmp_path / "file" / "run")


def test_images_that_are_too_small_leave_no_directory(train, tmp_path, dataset):
    small = dataclasses.replace(dataset.train, images=dataset.train.images[:, :8, :8])
    with pytest.raises(UsageError, match="needs images of at least 16x16 pixels"):
        train(CONFIG, tmp_path / "run", dataset=Dataset("small", small, small, dataset.class_names))
    assert not (tmp_path / "run").exists()


def test_deterministic_on_a_gpu_needs_xlas_flag(train, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, deterministic=True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    with pytest.raises(
        UsageError, match="needs XLA_FLAGS=--xla_gpu_deterministic_ops=true: set it before jax initializes"
    ):
        train(config, tmp_path / "run")


# Evaluation, prediction and export


def test_evaluating_on_other_classes_is_refused(run, dataset):
    other = Dataset("letters", dataset.train, dataset.test, ("a", "b", "c"))
    with pytest.raises(
        UsageError, match=r"does not match the run in .*: the network was trained on 16x16x1 images of 3 classes \(top"
    ):
        run.evaluate(other)
    with pytest.raises(UsageError, match=r"letters has 16x16x1 images of 4 classes \(a, b, c, \.\.\.\)$"):
        run.evaluate(dataclasses.replace(other, class_names=tuple("abcd")))


def test_evaluation_matches_labels_by_class_name(run, dataset):
    """The classes may be fewer and in another order."""
    test = dataset.test
    kept = test.labels != 1
    turned = Split(test.images[kept], np.where(test.labels[kept] == 0, 1, 0).astype(np.int32))
    evaluation = run.evaluate(Dataset("turned", turned, turned, ("bottom", "top")))
    expected = run.evaluate(dataset)
    np.testing.assert_array_equal(evaluation.labels, expected.labels[kept])
    np.testing.assert_array_equal(evaluation.predictions, expected.predictions[kept])


@pytest.mark.parametrize("count", [1, 23, 300])
def test_prediction_is_the_softmax_of_the_logits(run, dataset, count):
    """In as many batches as needed, the last of which is padded."""
    images = np.resize(dataset.test.images, (count, 16, 16, 1))
    probabilities = run.predict(images)
    assert probabilities.shape == (count, 3)
    assert run.predict(images[:0]).shape == (0, 3)
    apply = jax.jit(run.task.model.apply)
    logits = np.asarray(apply({"params": run.state.params}, run.task.preprocess(images)), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 16, 16, 1)), np.zeros((16, 16, 1), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)]
)
def test_predicting_other_images_is_refused(run, images):
    with pytest.raises(UsageError, match=r"images must be uint8 \[N, 16, 16, 1\], not (float64|uint8) \["):
        run.predict(images)


def test_export_without_the_dataset_is_verified_on_noise(run, tmp_path, caplog, monkeypatch):
    def gone(config):
        raise UsageError("the folder is gone")

    monkeypatch.setattr(data, "load", gone)
    verification = run.export(tmp_path / "file", "safetensors")
    assert verification.num_images == 300
    assert verification.largest_difference < 1e-5
    assert "verifying on random noise, because the test images cannot be loaded: the folder is gone" in caplog.text
