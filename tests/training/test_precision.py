"""The precision of products, read in the programs that are given to the compilers, and its effect on numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.models import MODELS
from cnn_jax.training.loop import create_task
from cnn_jax.training.state import TrainState
from cnn_jax.training.step import Batch, loss_fn, train_step

KEY = jax.random.key(0)


def task_of(precision, **settings):
    return create_task(Config(precision=precision, **settings), 3)


def batch_of(side=16):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (6, side, side, 1), np.uint8))
    return Batch.of(images, jnp.asarray(rng.integers(0, 3, 6), jnp.int32))


def products(task, platform) -> list[str]:
    """The matrix products and convolutions of a training step, as StableHLO for a platform."""
    state = jax.eval_shape(lambda: task.init(KEY, (16, 16, 1)))
    lowered = train_step.trace(state, batch_of(), KEY, 0.01, task=task).lower(lowering_platforms=(platform,))
    lines = [
        line for line in lowered.as_text().splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)
    ]
    assert len(lines) > 10
    return lines


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_float32_products_have_the_highest_precision_everywhere(platform, optimizer):
    for line in products(task_of("float32", optimizer=optimizer), platform):
        assert line.count("HIGHEST") == 2, line
        assert "bf16" not in line


@pytest.mark.parametrize("tta", ["flip", "multicrop"])
def test_averaging_logits_rounds_nothing(tta):
    task = task_of("float32", tta=tta)
    variables = jax.eval_shape(lambda: task.init(KEY, (16, 16, 1))).variables
    text = jax.jit(task.logits).trace(variables, batch_of().images).lower(lowering_platforms=("tpu",)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(lines) == 4  # three layers and the average
    assert all(line.count("HIGHEST") == 2 for line in lines)


def test_the_tutorial_computes_in_float32_everywhere():
    assert create_task(Config.from_yaml("tutorial"), 10).precision == "float32"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_by_default_the_device_chooses(platform):
    for line in products(task_of("default"), platform):
        assert "HIGHEST" not in line
        assert "bf16" not in line


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_bfloat16_products_have_bfloat16_factors(platform):
    lines = products(task_of("bfloat16"), platform)
    lines = [line for line in lines if not re.search(r"tensor<(6x3|60x3|3x60)xf32>", line)]  # the last layer
    # What makes a band matrix of a kernel on CPUs adds up copies of it, in float32.
    assert sum("bf16" in line for line in lines) >= 10
    if platform != "cpu":
        for line in lines:
            assert re.search(r": \(tensor<[^>]*bf16>, tensor<[^>]*bf16>\)", line), line


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"resnet34", "resnet50"}))
def test_bfloat16_computes_nearly_the_same_logits(model):
    exact, rough = (task_of(precision, model=model) for precision in ("float32", "bfloat16"))
    variables, images = init(exact).variables, batch_of().images
    expected, logits = (jax.jit(task.logits)(variables, images) for task in (exact, rough))
    assert logits.dtype == jnp.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_bfloat16_keeps_float32_parameters_gradients_and_loss():
    task = task_of("bfloat16", model="small", model_width=4)
    state = init(task)
    exact = task_of("float32", model="small", model_width=4)
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)
    (expected, _), exact_grads = value_and_grad(state.params, state.model_state, exact, batch_of(), KEY)
    (loss, _), grads = value_and_grad(state.params, state.model_state, task, batch_of(), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, grads))} == {jnp.dtype("float32")}
    assert loss == pytest.approx(float(expected), rel=0.01)
    distance, norm = (
        jnp.linalg.norm(jax.flatten_util.ravel_pytree(tree)[0])
        for tree in (jax.tree.map(jnp.subtract, grads, exact_grads), exact_grads)
    )
    assert 0 < distance / norm < 0.2  # rounding decides which of nearly equal numbers max-pooling takes

    before = dtypes(state)
    new_state, metrics = train_step(state, batch_of(), KEY, 0.01, task=task)
    assert dtypes(new_state) == before
    assert metrics.loss.dtype == jnp.float32


def init(task) -> TrainState:
    return jax.jit(lambda: task.init(KEY, (16, 16, 1)))()


def dtypes(state: TrainState):
    return jax.tree.map(lambda leaf: leaf.dtype, state)
