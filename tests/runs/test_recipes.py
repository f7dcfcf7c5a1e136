"""Runs with other settings than the lesson's: what is stored, resumed, refused, and stopped early."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import CONFIG, assert_same_state, stop_at

from cnn_jax.data import Dataset, Split
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.checkpoint import newest_metadata
from cnn_jax.runs.fit import StoppedError, fit
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.run import load_run
from cnn_jax.runs.workdir import Workdir
from cnn_jax.training.history import EpochRecord, ran_out_of_patience

RECIPE = dataclasses.replace(
    CONFIG,
    model="small",
    model_width=2,
    optimizer="muon",
    schedule="linear",
    warmup="3 steps",
    weight_decay=0.01,
    clip_norm=1.0,
    accumulate=2,
    average_decay=0.9,
    flip="alternating",
    shift=1,
    random_erasing=0.5,
    mixup=0.2,
    label_smoothing=0.1,
    class_weights="balanced",
    tta="flip",
)
"""A bit of everything."""


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train(RECIPE, tmp_path_factory.mktemp("recipe") / "run")


def test_a_stopped_run_resumes_bitwise_equal(trained, train, continue_run, tmp_path):
    with pytest.raises(StoppedError):
        train(RECIPE, tmp_path / "run", stop_requested=stop_at(4))
    resumed = continue_run(RECIPE, tmp_path / "run")
    assert_same_state(jax.device_get(resumed.state), jax.device_get(trained.state))


def test_a_loaded_run_has_the_same_task(trained):
    loaded = load_run(trained.workdir)
    assert loaded.task == trained.task
    assert loaded.task.optimizer.schedule.updates == 4 * 5 // 2
    assert loaded.task.optimizer.schedule.warmup == 2


def test_test_time_augmentation_averages_the_mirror_image(trained, dataset):
    images = dataset.test.images[:3]
    plain = dataclasses.replace(trained.task, tta="none")
    logits, mirrored = (plain.logits(trained.state.variables, part) for part in (images, images[:, :, ::-1]))
    expected = jax.nn.softmax((logits + mirrored) / 2)
    np.testing.assert_allclose(load_run(trained.workdir).predict(images), expected, rtol=1e-4, atol=1e-6)
    assert np.abs(logits - mirrored).max() > 1e-3


def test_epochs_cannot_change_with_a_schedule(trained, continue_run):
    with pytest.raises(
        UsageError, match=r"--schedule linear of the run .*: epochs was 4 and is now 6; start a new run"
    ):
        continue_run(dataclasses.replace(RECIPE, epochs=6), trained.workdir)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, -1.0], [1.0, 1.0, float("inf")], ["1", 1.0, 1.0], 3.0])
def test_class_weights_in_a_checkpoint_are_checked(trained, weights, tmp_path):
    values = newest_metadata(Workdir(trained.workdir).checkpoints)
    assert len(values["class_weights"]) == 3
    RunMetadata.from_json(values, tmp_path)
    with pytest.raises(CnnJaxError, match="not written by this package"):
        RunMetadata.from_json(values | {"class_weights": weights}, tmp_path)


def record(accuracy):
    return EpochRecord(0, 0, 0, 0.0, 0.0, None, None, 0.0, 0.0, validation_loss=0.0, validation_accuracy=accuracy)


@pytest.mark.parametrize(
    ("accuracies", "stops"),
    [([], False), ([0.5], False), ([0.5, 0.4], False), ([0.5, 0.4, 0.5], True), ([0.5, 0.4, 0.6, 0.5], False)],
)
def test_patience(accuracies, stops):
    config = dataclasses.replace(CONFIG, patience=2)
    history = [record(accuracy) for accuracy in accuracies]
    assert ran_out_of_patience(config, history) is stops
    assert not ran_out_of_patience(CONFIG, history)


def test_training_stops_out_of_patience(train, continue_run, tmp_path):
    """With a learning rate that changes nothing, so that no epoch is better than the first."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-12, patience=2, validation_fraction=0.3, epochs=9)
    assert len(train(config, tmp_path / "run").history) == 3
    assert len(continue_run(config, tmp_path / "run").history) == 3
    assert len(continue_run(dataclasses.replace(config, patience=3), tmp_path / "run").history) == 4


def test_patience_needs_a_validation_set(train, tmp_path):
    with pytest.raises(UsageError, match="--patience needs a validation set"):
        train(dataclasses.replace(CONFIG, patience=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_without_training_images_is_an_error(dataset, tmp_path):
    others = dataset.train.labels != 1
    train = Split(dataset.train.images[others], dataset.train.labels[others])
    with pytest.raises(UsageError, match="class middle of squares has no training images"):
        fit(CONFIG, tmp_path / "run", dataset=Dataset("squares", train, dataset.test, dataset.class_names))


def test_batch_normalization_needs_two_examples(train, tmp_path):
    with pytest.raises(UsageError, match="needs batches of at least 2 examples: set a larger --batch-size"):
        train(dataclasses.replace(CONFIG, model="small", batch_size=1), tmp_path / "run")


def test_a_shift_larger_than_the_images_is_an_error(train, tmp_path):
    with pytest.raises(UsageError, match="cannot shift images of 16x16 pixels by 16"):
        train(dataclasses.replace(CONFIG, shift=16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_frozen_backbone_does_not_change(trained, train, dataset, tmp_path, caplog):
    """But the head, which is new as the classes have other names."""
    other = dataclasses.replace(dataset, class_names=("left", "center", "right"))
    config = dataclasses.replace(
        CONFIG,
        model="small",
        model_width=2,
        optimizer="adamw",
        weight_decay=0.1,
        freeze="backbone",
        init_from=str(trained.workdir),
        epochs=1,
    )
    with caplog.at_level("INFO", logger="cnn_jax"):
        run = train(config, tmp_path / "run", dataset=other)
    before, after = ({**state.variables, **state.variables["params"]} for state in (trained.state, run.state))
    for variables in (before, after):
        del variables["params"]
    assert not np.allclose(before.pop("out")["kernel"], after.pop("out")["kernel"])
    assert_same_state(before, after)
    assert "the head out is new: the weights are for other classes than those of the dataset" in caplog.messages


def test_a_head_for_the_same_classes_is_kept(trained, train, caplog, tmp_path):
    config = dataclasses.replace(
        CONFIG, model="small", model_width=2, learning_rate=1e-12, init_from=str(trained.workdir), epochs=1
    )
    with caplog.at_level("INFO", logger="cnn_jax"):
        run = train(config, tmp_path / "run")
    expected = trained.state.variables["params"]["out"]["kernel"]
    np.testing.assert_allclose(run.state.params["out"]["kernel"], expected, atol=1e-6)
    assert not [record for record in caplog.records if "the head" in record.message]


def test_the_model_of_the_weights_is_named(trained, train, tmp_path):
    with pytest.raises(UsageError, match=r"are for the network small: use --model small"):
        train(dataclasses.replace(CONFIG, init_from=str(trained.workdir)), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "backbone"}, "name trained ones with --init-from"),
        ({"freeze": "backbone", "backbone_rate": 0.1}, "set only one of them"),
        ({"accumulate": 21}, "--accumulate 21 is more than the 20 steps of the run"),
        ({"warmup": "20 steps"}, "the warm-up takes 20 updates, and the whole run 20"),
        ({"warmup": "999999999 epochs"}, "set a shorter --warmup"),
    ],
)
def test_settings_without_an_effect_are_refused(train, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        train(dataclasses.replace(CONFIG, **settings), tmp_path / "run")


def test_a_smoothed_loss_is_not_taken_for_one_that_does_not_fall(train, caplog, tmp_path):
    train(dataclasses.replace(CONFIG, label_smoothing=0.95, epochs=12), tmp_path / "run")
    assert not [record for record in caplog.records if "not learning" in record.message]


def test_settings_that_contradict_each_other_are_refused_before_the_data_is_read(tmp_path):
    config = dataclasses.replace(CONFIG, dataset="folder:/missing", weight_decay=0.1)
    with pytest.raises(UsageError, match="adam has no weight decay"):
        fit(config, tmp_path / "run")
