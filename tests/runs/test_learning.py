"""What a run says about the network's input, and about a network that does not learn."""

import dataclasses

import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.runs.fit import fit
from cnn_jax.runs.run import load_run
from cnn_jax.training.task import SCALE

CONFIG = Config(epochs=2, batch_size=16, dataset="squares")


def test_the_input_is_standardized_as_in_training(dataset, tmp_path):
    run = fit(CONFIG, tmp_path / "run", dataset=dataset, report=False)
    inputs = np.asarray(run.task.preprocess(dataset.train.images))
    assert (inputs.mean(), inputs.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    loaded = load_run(tmp_path / "run")
    assert loaded.task == run.task
    np.testing.assert_array_equal(loaded.predict(dataset.test.images), run.predict(dataset.test.images))


def test_without_normalize_it_is_only_scaled(dataset, tmp_path):
    run = fit(dataclasses.replace(CONFIG, normalize=False), tmp_path / "run", dataset=dataset, report=False)
    assert run.task.preprocess == SCALE


def test_a_network_that_does_not_learn_is_warned_of(dataset, tmp_path, caplog):
    config = dataclasses.replace(CONFIG, learning_rate=100, batch_size=2, epochs=4)
    fit(config, tmp_path / "run", dataset=dataset, report=False)
    (warning,) = [record.getMessage() for record in caplog.records if "not learning" in record.message]
    assert warning.endswith("after epoch 2, and 1.0986 is that of guessing; try a lower --learning-rate")


def test_a_constant_prediction_is_warned_of(dataset, tmp_path, caplog):
    """Noise with ten times as many examples of one class as of the others."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (240, 16, 16, 1), np.uint8), np.repeat([0, 1, 2], [200, 20, 20])
    noise = Dataset.from_arrays((images, labels), (images, labels), class_names=("many", "few", "fewer"))
    fit(Config(epochs=1, batch_size=4), tmp_path / "run", dataset=noise, report=False)
    assert [record.getMessage() for record in caplog.records] == [
        "the network predicts many for every test image: try a lower --learning-rate"
    ]


def test_a_network_that_had_no_time_to_learn_is_not_warned_of(dataset, tmp_path, caplog):
    config = Config(epochs=1, batch_size=47, learning_rate=1e-6)
    fit(config, tmp_path / "run", dataset=dataset, report=False)
    assert not caplog.records


def test_a_network_that_learns_is_not_warned_of(dataset, tmp_path, caplog):
    fit(dataclasses.replace(CONFIG, epochs=20), tmp_path / "run", dataset=dataset, report=False)
    assert not caplog.records
