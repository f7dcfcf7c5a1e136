import dataclasses
import json

import jax
import numpy as np
import pytest

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.runs.fit import fit, resume
from cnn_jax.runs.run import load_run

CONFIG = Config(epochs=4, batch_size=10, dataset="squares", seed=3)


@pytest.fixture(autouse=True)
def known_dataset(dataset, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: dataclasses.replace(dataset, name=config.dataset))


def continue_run(config, workdir, **options):
    """Resume with all the settings of a config, as the command does."""
    return resume(workdir, **options, **dataclasses.asdict(config))


def without_times(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "images_per_second")} for line in lines]


def assert_same_state(state1, state2):
    jax.tree.map(np.testing.assert_array_equal, state1, state2)


def test_what_a_run_leaves(tmp_path):
    lines = []
    run = fit(CONFIG, tmp_path / "run", on_epoch=lines.append)
    assert tuple(lines) == run.history
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


def test_default_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(dataclasses.replace(CONFIG, epochs=1, dataset="tfds:emnist/letters"))
    assert run.workdir.parent.name == "runs"
    assert run.workdir.name.startswith("tfds-emnist-letters-cnn-20")


@pytest.mark.parametrize("epochs", [1, 3])
def test_resumed_is_the_same_to_the_bit(tmp_path, epochs):
    whole = fit(CONFIG, tmp_path / "whole")
    fit(dataclasses.replace(CONFIG, epochs=epochs), tmp_path / "parts")
    resumed = []
    run = continue_run(CONFIG, tmp_path / "parts", on_epoch=resumed.append)
    assert [record.epoch for record in resumed] == list(range(epochs, 4))
    assert_same_state(run.state, whole.state)
    assert without_times(tmp_path / "parts/metrics.jsonl") == without_times(tmp_path / "whole/metrics.jsonl")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = fit(CONFIG, tmp_path)
    again = continue_run(CONFIG, tmp_path)
    assert again.history == run.history
    assert_same_state(again.state, run.state)


def test_load_run_gives_what_training_ended_with(tmp_path, dataset):
    run = fit(CONFIG, tmp_path)
    loaded = load_run(tmp_path)
    assert_same_state(loaded.state, run.state)
    assert (loaded.history, loaded.class_names) == (run.history, dataset.class_names)
    evaluation = loaded.evaluate(dataset)
    assert evaluation.loss == run.history[-1].test_loss
    assert evaluation.accuracy == run.history[-1].test_accuracy
    assert np.mean(evaluation.labels == evaluation.predictions) == pytest.approx(evaluation.accuracy)


def test_newest_and_best_are_kept(tmp_path):
    run = fit(dataclasses.replace(CONFIG, epochs=12, learning_rate=0.03), tmp_path)
    accuracies = [record.test_accuracy for record in run.history]
    best = max(range(12), key=lambda epoch: (accuracies[epoch], epoch))
    assert load_run(tmp_path).history[-1].epoch == 11
    assert load_run(tmp_path, "best").history[-1].epoch == best
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {5 * 11, 5 * 12, 5 * (best + 1)}


def test_runs_started_within_a_second_have_their_own_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    workdirs = [fit(dataclasses.replace(CONFIG, epochs=1)).workdir.name for _ in range(2)]
    assert workdirs == ["squares-cnn-20260101-000000", "squares-cnn-20260101-000000-2"]


def test_target_accuracy_stops_training(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=50, target_accuracy=0.95)
    run = fit(config, tmp_path)
    *before, last = [record.test_accuracy for record in run.history]
    assert last >= 0.95 > max(before)
    assert continue_run(config, tmp_path).history == run.history


def test_a_directory_in_use_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UsageError, match="exists and is not a run directory: choose another --workdir"):
        fit(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_with_other_settings_is_refused(tmp_path):
    fit(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    other = dataclasses.replace(CONFIG, dataset="circles", batch_size=20)
    with pytest.raises(UsageError, match=r"dataset was squares and is now circles, batch_size was 10 and is now 20"):
        continue_run(other, tmp_path)


def test_a_run_that_lost_its_checkpoints_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.to_yaml())
    (tmp_path / "metrics.jsonl").touch()  # written after the first checkpoint
    for attempt in (lambda: load_run(tmp_path), lambda: continue_run(CONFIG, tmp_path)):
        with pytest.raises(UsageError, match="contains no checkpoint"):
            attempt()


def test_a_directory_without_run_is_refused(tmp_path):
    for attempt in (lambda: load_run(tmp_path), lambda: continue_run(CONFIG, tmp_path)):
        with pytest.raises(UsageError, match="is not a run directory"):
            attempt()


def test_evaluating_on_other_classes_is_refused(tmp_path, dataset):
    run = fit(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    other = Dataset("letters", dataset.train, dataset.test, ("a", "b", "c"))
    with pytest.raises(
        UsageError, match=r"does not match the run in .*: the network was trained on 16x16x1 images of 3 classes \(top"
    ):
        run.evaluate(other)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the run directory .* \(Not a directory\): choose another"):
        fit(CONFIG, tmp_path / "file" / "run")


def test_deterministic_on_a_gpu_needs_xlas_flag(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, deterministic=True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    with pytest.raises(
        UsageError, match="needs XLA_FLAGS=--xla_gpu_deterministic_ops=true: set it before jax initializes"
    ):
        fit(config, tmp_path / "run")


def test_a_data_set_of_images_too_small_leaves_no_directory(tmp_path, dataset, monkeypatch):
    small = dataclasses.replace(dataset.train, images=dataset.train.images[:, :8, :8])
    monkeypatch.setattr(data, "load", lambda config: Dataset("small", small, small, dataset.class_names))
    with pytest.raises(UsageError, match="needs images of at least 16x16 pixels"):
        fit(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_going_on_with_other_devices_is_said(tmp_path, caplog):
    run = fit(dataclasses.replace(CONFIG, epochs=1), tmp_path / "run", devices=jax.devices()[:1])
    assert json.loads((run.workdir / "summary.json").read_text())["device_count"] == 1
    resumed = continue_run(dataclasses.replace(CONFIG, epochs=2), tmp_path / "run")
    assert "was trained on 1 device(s) and is resumed on 2: results agree up to rounding" in caplog.text
    assert json.loads((run.workdir / "summary.json").read_text())["device_count"] == 2
    expected = fit(dataclasses.replace(CONFIG, epochs=2), tmp_path / "other")
    assert resumed.history[-1].loss == pytest.approx(expected.history[-1].loss, rel=1e-4)


def test_a_second_run_compiles_nothing(tmp_path):
    """Programs are compiled for a model, whose like is therefore made but once."""
    fit(CONFIG, tmp_path / "first")
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **details: events.append(event))
    jax.jit(lambda x: x + 1)(0)
    compilations = sum(event.endswith("backend_compile_duration") for event in events)
    assert compilations == 1, "the listener does not hear of compilations"
    fit(dataclasses.replace(CONFIG, seed=4), tmp_path / "second")
    assert sum(event.endswith("backend_compile_duration") for event in events) == compilations


def test_classes_may_be_fewer_and_in_another_order(tmp_path, dataset):
    """Labels are matched by the classes' names."""
    run = fit(CONFIG, tmp_path)
    test = dataset.test
    kept = test.labels != 1
    turned = Split(test.images[kept], np.where(test.labels[kept] == 0, 1, 0).astype(np.int32))
    evaluation = run.evaluate(Dataset("turned", turned, turned, ("bottom", "top")))
    expected = run.evaluate(dataset)
    np.testing.assert_array_equal(evaluation.labels, expected.labels[kept])
    np.testing.assert_array_equal(evaluation.predictions, expected.predictions[kept])


@pytest.mark.parametrize("count", [1, 23, 300])
def test_prediction_is_the_softmax_of_the_logits(tmp_path, dataset, count):
    """In as many batches as it takes, the last one filled up."""
    run = fit(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    images = np.resize(dataset.test.images, (count, 16, 16, 1))
    probabilities = run.predict(images)
    assert probabilities.shape == (count, 3)
    assert run.predict(images[:0]).shape == (0, 3)
    logits = np.asarray(run.task.model.apply({"params": run.state.params}, images.astype(np.float32) / 255), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 16, 16, 1)), np.zeros((16, 16, 1), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)]
)
def test_predicting_other_images_is_refused(tmp_path, images):
    run = fit(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    with pytest.raises(UsageError, match=r"images must be uint8 \[N, 16, 16, 1\], not (float64|uint8) \["):
        run.predict(images)


def test_what_is_exported_without_its_data_is_verified_on_noise(tmp_path, caplog, monkeypatch):
    def gone(config):
        raise UsageError("the folder is gone")

    run = fit(dataclasses.replace(CONFIG, epochs=1), tmp_path / "run")
    monkeypatch.setattr(data, "load", gone)
    verification = run.export(tmp_path / "file", "safetensors")
    assert verification.num_images == 300
    assert verification.largest_difference < 1e-5
    assert "verifying on random noise, because the test images cannot be loaded: the folder is gone" in caplog.text


def test_going_on_with_a_changed_data_set_is_refused(tmp_path, dataset, monkeypatch):
    """As many images of the same shape; but a class has another name, or a label is another."""
    fit(dataclasses.replace(CONFIG, epochs=1), tmp_path)
    labels = dataset.train.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    for changed in (
        dataclasses.replace(dataset, class_names=("top", "middle", "below")),
        dataclasses.replace(dataset, train=Split(dataset.train.images, labels)),
        dataclasses.replace(dataset, test=Split(dataset.test.images, np.roll(dataset.test.labels, 1))),
        dataclasses.replace(dataset, test=Split(255 - dataset.test.images, dataset.test.labels)),
    ):
        monkeypatch.setattr(data, "load", lambda config, changed=changed: dataclasses.replace(changed, name="squares"))
        with pytest.raises(UsageError, match=r"the dataset changed since the run in .* was trained"):
            continue_run(CONFIG, tmp_path)
