"""The package against the lesson in PyTorch, whose values scripts/generate_reference.py wrote."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.data import load
from cnn_jax.models.cnn import CNN
from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.state import Params, TrainState
from cnn_jax.training.step import Batch, loss_fn, train_step
from cnn_jax.training.task import Task

Arrays = dict[str, np.ndarray]

TASK = Task(CNN(10), Optimizer())
KEY = jax.random.key(0)
LAYERS = ("conv1", "conv2", "fc1", "fc2", "out")
PYTORCH_NAMES = {"kernel": "weight", "bias": "bias"}
STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def full_precision() -> Iterator[None]:
    """Products in float32 on every device: GPUs and TPUs else shorten the factors."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def reference() -> Arrays:
    with np.load(Path(__file__).parent / "reference" / "pytorch_lesson.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def training(reference: Arrays) -> tuple[list[float], list[Params]]:
    """The loss of each step, and the parameters after it."""
    state = initial_state(reference)
    losses, params = [], []
    for step in range(STEPS):
        state, metrics = train_step(state, batch_of(reference, step), KEY, 0.01, task=TASK)
        losses.append(float(metrics.loss))
        # Copies, for the next step reuses the memory.
        params.append(jax.tree.map(np.array, state.params))
    return losses, params


def initial_state(reference: Arrays) -> TrainState:
    state = TASK.init(KEY, (28, 28, 1))
    return state.replace(params=jax.tree.map(jnp.array, to_package(reference, "initial")))


def to_package(reference: Arrays, prefix: str) -> Params:
    """The reference's values for the parameters, in the package's names and layouts."""
    return {
        layer: {
            "kernel": to_kernel(layer, reference[f"{prefix}/{layer}.weight"]),
            "bias": reference[f"{prefix}/{layer}.bias"],
        }
        for layer in LAYERS
    }


def to_kernel(layer: str, weight: np.ndarray) -> np.ndarray:
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)  # OIHW to HWIO
    if layer == "fc1":
        # Its inputs are conv2's outputs, which PyTorch flattens in the order C, H, W and the package in H, W, C.
        weight = weight.reshape(-1, 12, 4, 4).transpose(0, 2, 3, 1).reshape(-1, 192)
    return weight.T


def batch_of(reference: Arrays, step: int) -> Batch:
    index = step % len(reference["images"])
    images = reference["images"][index].transpose(0, 2, 3, 1)
    labels = reference["labels"][index].astype(np.int32)
    return Batch.of(images, labels)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The greatest absolute error in an array over the greatest absolute value expected in it."""
    assert actual.shape == expected.shape
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def error_of_way(actual: np.ndarray, expected: np.ndarray, initial: np.ndarray) -> float:
    """The Euclidean norm of a parameter's error over that of its way from its initial value."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected - initial)


def assert_all_below(errors: Params, tolerance: float) -> None:
    """Every parameter's error is below the tolerance; the failure names those that are not."""
    too_great = {(layer, name): e for layer, of in errors.items() for name, e in of.items() if not e < tolerance}
    assert too_great == {}


loss_and_grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)


def test_logits_loss_and_gradients_agree(reference):
    params, batch = to_package(reference, "initial"), batch_of(reference, 0)
    (loss, (logits, _)), grads = loss_and_grads(params, {}, TASK, batch, KEY)
    logits, grads = jax.device_get((logits, grads))
    assert relative_error(logits, reference["logits"]) < 1e-5
    assert float(loss) == pytest.approx(reference["losses"][0], rel=1e-5)
    assert_all_below(jax.tree.map(relative_error, grads, to_package(reference, "gradient")), 1e-5)


def test_losses_of_the_steps_agree(reference, training):
    losses, _ = training
    np.testing.assert_allclose(losses, reference["losses"], rtol=1e-5)


@pytest.mark.skipif("CNN_JAX_DATA_DIR" not in os.environ, reason="CNN_JAX_DATA_DIR is not set")
def test_losses_of_the_lesson_agree(reference):
    """On the first 120 batches of Fashion-MNIST in file order.

    Rounding errors grow, in PyTorch too: with another number of threads its own losses differ by 1e-3 after 60 steps,
    and by several percent after 120.
    """
    train = load(Config(dataset="fashion_mnist")).train
    state, losses = initial_state(reference), []
    for start in range(0, 12_000, 100):
        batch = Batch.of(train.images[start : start + 100], train.labels[start : start + 100])
        state, metrics = train_step(state, batch, KEY, 0.01, task=TASK)
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses[:40], reference["lesson_losses"][:40], rtol=1e-5)
    assert np.mean(losses) == pytest.approx(reference["lesson_losses"].mean(), rel=0.01)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_parameters_after_steps_agree(reference, training, steps):
    _, params = training
    expected, initial = to_package(reference, f"step{steps}"), to_package(reference, "initial")
    assert_all_below(jax.tree.map(error_of_way, params[steps - 1], expected, initial), 1e-4)


@pytest.mark.parametrize("name", PYTORCH_NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_step_leads_as_far(reference, training, layer, name):
    _, params = training
    initial = to_package(reference, "initial")[layer][name]
    displacements = [np.linalg.norm(step[layer][name] - initial) for step in params]
    np.testing.assert_allclose(displacements, reference[f"displacement/{layer}.{PYTORCH_NAMES[name]}"], rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "mistake"),
    [
        pytest.param("conv1", lambda weight: weight.transpose(3, 2, 1, 0), id="height and width swapped"),
        pytest.param("conv2", lambda weight: weight[:, :, ::-1, ::-1].transpose(2, 3, 1, 0), id="kernel flipped"),
        pytest.param("fc1", lambda weight: weight.T, id="flattened in the order C, H, W"),
    ],
)
def test_mistaken_conversion_would_be_caught(
    reference: Arrays, layer: str, mistake: Callable[[np.ndarray], np.ndarray]
):
    params = to_package(reference, "initial")
    params[layer]["kernel"] = mistake(reference[f"initial/{layer}.weight"])
    (_, (logits, _)), _ = loss_and_grads(params, {}, TASK, batch_of(reference, 0), KEY)
    assert relative_error(np.array(logits), reference["logits"]) > 1e-2
