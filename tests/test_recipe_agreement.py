"""The recipe ``cpu`` and its peer in PyTorch, scripts/pytorch_recipe.py, compute the same."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.training.loop import create_task_for
from cnn_jax.training.step import Batch, train_step

RECIPE = dataclasses.replace(Config.from_yaml("cpu"), epochs=2, batch_size=16, flip="none")


@pytest.fixture
def pytorch_recipe(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    yield pytest.importorskip("pytorch_recipe")
    del sys.modules["pytorch_recipe"]


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (32, 24, 20, 2), np.uint8), rng.integers(0, 3, 32, np.int32)
    split = Split(images, labels)
    return Dataset("noise", split, split, ("a", "b", "c"))


def variables_of(network):
    """The weights of the PyTorch network, as a Flax model's variables."""
    *layers, linear = [layer for layer in network if next(layer.parameters(), None) is not None]
    params, batch_stats = {}, {}
    for number, (convolution, norm) in enumerate(zip(layers[::2], layers[1::2], strict=True), start=1):
        kernel = convolution.kernel.detach().numpy().reshape(len(convolution.bias), -1, 3, 3)
        params[f"conv{number}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": convolution.bias.detach().numpy()}
        params[f"bn{number}"] = {"scale": norm.weight.detach().numpy(), "bias": norm.bias.detach().numpy()}
        batch_stats[f"bn{number}"] = {"mean": norm.running_mean.numpy(), "var": norm.running_var.numpy()}
    params["out"] = {"kernel": linear.weight.detach().numpy().T, "bias": linear.bias.detach().numpy()}
    return jax.tree.map(jnp.array, {"params": params, "batch_stats": batch_stats})


@pytest.mark.parametrize(("optimizer", "depth"), [("adamw", 3), ("adamw", 6), ("muon", 3), ("muon", 6)])
def test_training_steps_agree(pytorch_recipe, dataset, optimizer, depth):
    """From the same weights: the parameters and the statistics after two steps of a schedule.

    With Muon, only the kernels, and few digits: PyTorch's computes in bfloat16, and optax adds Nesterov momentum to the
    Adam of the other parameters.
    """
    tolerance, kinds = {"adamw": (1e-3, ("kernel", "scale", "bias")), "muon": (0.2, ("kernel",))}[optimizer]
    config = dataclasses.replace(RECIPE, optimizer=optimizer, model_depth=depth, learning_rate=0.01)
    peer = pytorch_recipe.Recipe(config, dataset)
    task = create_task_for(config, dataset)
    start = variables_of(peer._network)
    state = jax.jit(lambda: task.init(jax.random.key(0), dataset.image_shape))()
    copied = jax.tree.map(jnp.copy, start)  # the step donates its state
    state = state.replace(params=copied["params"], model_state={"batch_stats": copied["batch_stats"]})
    images, labels = peer._train
    for part in (slice(0, 16), slice(16, 32)):
        peer._train_step(images[part], labels[part])
        batch = Batch.of(jnp.asarray(dataset.train.images[part]), jnp.asarray(dataset.train.labels[part]))
        state, _ = train_step(state, batch, jax.random.key(0), 0.01, task=task)
    end = variables_of(peer._network)
    last = f"conv{depth}"
    for name in ("conv2", last, "bn1", f"bn{depth}", "out") if optimizer == "adamw" else ("conv2", last):
        for kind in end["params"][name].keys() & set(kinds):
            theirs = end["params"][name][kind]
            update = theirs - start["params"][name][kind]
            ours = state.params[name][kind] - start["params"][name][kind]
            np.testing.assert_allclose(ours, update, atol=tolerance * np.abs(update).max())
    np.testing.assert_allclose(
        state.model_state["batch_stats"][f"bn{depth}"]["var"], end["batch_stats"][f"bn{depth}"]["var"], rtol=1e-2
    )


@pytest.mark.parametrize("depth", [3, 6])
def test_predictions_agree(pytorch_recipe, dataset, depth):
    """Logits with the mirror image averaged in, and the fraction of correct ones, of networks that were not trained."""
    config = dataclasses.replace(RECIPE, model_depth=depth)
    peer = pytorch_recipe.Recipe(config, dataset)
    logits = create_task_for(config, dataset).logits(variables_of(peer._network), dataset.test.images)
    peer_accuracy = peer.test_accuracy()
    images, _ = peer._test
    expected = (peer._network(images) + peer._network(images.flip(3))).detach().numpy() / 2
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert peer_accuracy == pytest.approx(np.mean(np.argmax(logits, axis=-1) == dataset.test.labels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"mixup": 0.2}, "does not have mixup 0.2"), ({"model": "cnn"}, "does not have model 'cnn'")],
)
def test_settings_without_a_counterpart_are_refused(pytorch_recipe, dataset, settings, message):
    with pytest.raises(UsageError, match=message):
        pytorch_recipe.Recipe(dataclasses.replace(RECIPE, **settings), dataset)
