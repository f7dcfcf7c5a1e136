"""Training that starts from given weights."""

import dataclasses

import jax
import numpy as np
import pytest

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.errors import UsageError
from cnn_jax.formats import pytorch, safetensors
from cnn_jax.formats.network import Network
from cnn_jax.report import plots
from cnn_jax.runs.fit import StoppedError, fit, resume
from cnn_jax.runs.run import load_run
from cnn_jax.training.step import Batch, loss_fn

SHAPE = (16, 16, 1)


@pytest.fixture(autouse=True)
def small_data(dataset, monkeypatch):
    monkeypatch.setattr(data, "load", lambda config: dataclasses.replace(dataset, name=config.dataset))
    # Drawing takes most of the time of so small a training, and test_run looks at it.
    monkeypatch.setattr(plots, "save_curves", lambda path, *figures: path.touch())
    monkeypatch.setattr(plots, "save_confusion", lambda path, *figures: path.touch())


@pytest.fixture
def given(make_run, dataset):
    run = make_run(SHAPE, seed=7)
    return Network("cnn", run.task, SHAPE, dataset.class_names, jax.device_get(run.state.params))


@pytest.fixture(params=[safetensors, pytorch], ids=["flax", "pytorch"])
def config(request, given, tmp_path, monkeypatch):
    """Settings with a file of weights to start from, by a relative path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(request.param.to_bytes(given))
    return Config(epochs=2, batch_size=47, dataset="squares", init_from="weights")


def continue_run(config, workdir, **options):
    """Resume with all the settings of a config, as the command does."""
    return resume(workdir, **options, **dataclasses.asdict(config))


def assert_same_params(run1, run2):
    jax.tree.map(np.testing.assert_array_equal, run1.state.params, run2.state.params)


def test_training_starts_from_exactly_these_weights(config, given, dataset):
    with pytest.raises(StoppedError, match="after step 0"):
        fit(config, "run", stop_requested=lambda: True)
    run = load_run("run")
    assert run.state.step == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state.params), given.params)


def test_training_starts_from_the_newest_checkpoint_of_a_run(config, dataset, tmp_path):
    config = dataclasses.replace(config, init_from=None)
    trained = fit(config, "trained", dataset=dataset, report=False)
    with pytest.raises(StoppedError, match="after step 0"):
        fit(dataclasses.replace(config, init_from="trained"), "run", dataset=dataset, stop_requested=lambda: True)
    assert_same_params(load_run("run"), trained)


def test_a_run_on_other_images_is_refused(config, make_run, dataset):
    fit(dataclasses.replace(config, init_from=None, epochs=1), "trained", dataset=dataset, report=False)
    colors = {part: (np.repeat(split.images, 3, axis=3), split.labels) for part, split in dataset.splits.items()}
    with pytest.raises(UsageError, match=r"the weights in .*trained do not match this network for 16x16x3 images"):
        fit(dataclasses.replace(config, init_from="trained"), "run", dataset=Dataset.from_arrays(**colors))


def test_weights_are_checked_before_the_data_is_read(config, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(UsageError, match=r"there is no file .*/nowhere: "):
        fit(dataclasses.replace(config, init_from="nowhere"), "run")
    with pytest.raises(UsageError, match="unknown model 'resnet'"):
        fit(dataclasses.replace(config, model="resnet"), "run")


def test_the_first_steps_loss_is_these_weights(config, given, dataset):
    run = fit(config, "run")  # of one step an epoch
    batch = Batch.of(dataset.train.images, dataset.train.labels)
    loss, _ = loss_fn(given.params, {}, run.task, batch, jax.random.key(0))
    assert run.history[0].loss == pytest.approx(float(loss), rel=1e-5)


def test_gone_on_with_they_are_not_read_again(config, tmp_path):
    whole = fit(config, "whole")
    with pytest.raises(StoppedError):
        fit(config, "parts", stop_requested=lambda: True)
    assert Config.from_yaml(tmp_path / "parts" / "config.yaml").init_from == str(tmp_path / "weights")
    (tmp_path / "weights").unlink()
    assert_same_params(continue_run(config, "parts"), whole)


def test_other_weights_are_other_settings(config, tmp_path):
    fit(config, "run")
    with pytest.raises(UsageError, match=r"with other settings: init_from was /.*/weights and is now /.*/others;"):
        continue_run(dataclasses.replace(config, init_from="others"), "run")


def test_weights_of_another_network_leave_no_directory(config, make_run, tmp_path):
    run = make_run((16, 16, 3))
    params = jax.device_get(run.state.params)
    network = Network("cnn", run.task, (16, 16, 3), ("a", "b", "c"), params)
    (tmp_path / "weights").write_bytes(safetensors.to_bytes(network))
    with pytest.raises(
        UsageError,
        match=r"conv1\.kernel has shape \[5, 5, 3, 6\] instead of \[5, 5, 1, 6\]; the weights are for color images: ",
    ):
        fit(config, "run")
    assert not (tmp_path / "run").exists()
