"""Programs for TPUs, compiled by their compiler on a machine without one."""

import importlib
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from cnn_jax.config import Config
from cnn_jax.training.sharding import process_indices

pytestmark = pytest.mark.optimized
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[test,tpu]'"
)
STATE_BYTES = 4 * 3 * 32_998
"""Parameters of the lesson's network and two moments of Adam, without padding."""


@pytest.fixture(scope="module")
def ahead():
    """The script, whose environment variables are set while its tests run."""
    before = dict(os.environ)
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    yield importlib.import_module("compile_ahead")
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def measured(ahead):
    """The figures of a program of a config on Fashion-MNIST."""
    results = {}

    def measure(target, program, config):
        if (target, program, config) not in results:
            recipe = ahead.Recipe("test", config, (28, 28, 1), 60_000, 10_000, 10)
            lower = dict(recipe.programs(ahead.TARGETS[target].mesh()))[program]
            results[target, program, config] = ahead.measure(lower(), ahead.TARGETS[target], recipe.steps_per_epoch)
        return results[target, program, config]

    return measure


@needs_libtpu
@pytest.mark.parametrize(("target", "num_devices"), [("v5e-1", 1), ("v5e-8", 8)])
def test_the_step_convolves_on_the_device_and_fits(measured, target, num_devices):
    figures = measured(target, "train", Config())
    assert figures["convolutions"] == 5  # two forward, two for kernels, one for the input of the second
    # 100 images, forward and twice as much backward, without the gradient of the input; band matrices multiply more.
    operations = 2 * (2 * 5 * 5 * 6 * 24 * 24 + 3 * 5 * 5 * 6 * 12 * 8 * 8 + 3 * (192 * 120 + 120 * 60 + 60 * 10))
    assert figures["flops"] == pytest.approx(math.ceil(100 / num_devices) * operations, rel=0.3)
    assert figures["memory_fraction"] < 0.01
    assert figures["host_transfers"] == 0
    assert figures["aliased_bytes"] >= STATE_BYTES  # the state of the last step gives its memory to that of the next
    assert figures["estimated_seconds"] < 1e-3


@needs_libtpu
def test_one_device_communicates_with_nobody(measured):
    assert measured("v5e-1", "train", Config())["collectives"] == []


@needs_libtpu
def test_gradients_loss_and_number_correct_are_summed_at_once(measured):
    (only,) = measured("v5e-8", "train", Config())["collectives"]
    assert only["operation"] == "all-reduce"
    assert 4 * (32_998 + 2) <= only["bytes"] <= 4 * (32_998 + 2) + 512


@pytest.mark.slow
@needs_libtpu
def test_the_256_devices_of_64_processes_communicate_once_per_step(ahead, measured):
    assert process_indices(ahead.TARGETS["v5e-256"].mesh()) == list(range(64))
    (only,) = measured("v5e-256", "train", Config())["collectives"]
    assert only["operation"] == "all-reduce"
    assert only["bytes"] == 4 * (32_998 + 2)


@needs_libtpu
def test_batch_normalization_sums_its_mean_variance_and_their_gradients_too(measured):
    config = Config(model="small", model_width=4, optimizer="sgd")
    found = measured("v5e-8", "train", config)["collectives"]
    assert {each["operation"] for each in found} == {"all-reduce"}
    # Each needs the result of the one before it, so they cannot be one.
    assert len(found) == 1 + 3 * 4
    assert sum(each["bytes"] < 1000 for each in found) == 3 * 4


@needs_libtpu
def test_evaluation_communicates_nothing(measured):
    figures = measured("v5e-8", "evaluate", Config())
    assert figures["collectives"] == []
    assert figures["convolutions"] >= 2


@needs_libtpu
def test_the_export_compiles(measured):
    figures = measured("v5e-1", "export", Config())
    assert figures["convolutions"] >= 2
    assert figures["collectives"] == []


def test_what_is_missing_is_told(ahead, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (row,) = ahead.compile_for("h100-1", ["tutorial"])
    assert row["error"] == "jax_cuda12_plugin is not installed: pip install -e '.[cuda]'"


def test_a_program_whose_time_xla_cannot_estimate_has_no_estimate(ahead):
    compiled = mock.Mock()
    compiled.as_text.return_value = "ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n}\n"
    compiled.cost_analysis.return_value = {"flops": 1e9, "optimal_seconds": -22.9}
    sizes = ("argument", "temp", "output", "alias")
    compiled.memory_analysis.return_value = SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in sizes})
    figures = ahead.measure(mock.Mock(compile=lambda: compiled), ahead.TARGETS["v5e-1"], 600)
    assert figures["estimated_seconds"] is figures["estimated_epoch_seconds"] is figures["peak_fraction"] is None


@needs_libtpu
def test_members_of_a_sweep_exchange_nothing(ahead):
    target, recipe = ahead.TARGETS["v5e-8"], ahead.Recipe("test", Config(), (28, 28, 1), 60_000, 10_000, 10)
    lower = dict(recipe.programs(target.mesh(), [2]))["train 2 members"]
    figures = ahead.measure(lower(), target, recipe.steps_per_epoch)
    assert figures["collectives"] == []
    assert figures["convolutions"] > 0
    assert figures["host_transfers"] == 0
    assert figures["aliased_bytes"] >= 2 * STATE_BYTES
