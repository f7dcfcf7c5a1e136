import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from cnn_jax.config import Config
from cnn_jax.models.cnn import CNN
from cnn_jax.training import loop, sharding
from cnn_jax.training.loop import Trainer
from cnn_jax.training.sharding import SAME, make_mesh, on_every_device, part_of_batch, parts_along, sum_over_devices

CONFIG = Config(epochs=2, batch_size=20, dataset="squares", seed=3)


@pytest.fixture
def mesh():
    return Mesh(jax.devices(), ("devices",))


@pytest.mark.parametrize(
    ("batch_size", "devices"), [(100, 2), (101, 1), (32, 2), (30, 1), (1, 1), (2_000_000, 2), (1_999_999, 1)]
)
def test_devices_share_a_batch_evenly_with_enough_for_each(batch_size, devices):
    assert make_mesh(batch_size).size == devices


def test_the_parts_are_the_batch(mesh):
    def places():
        offset, size = part_of_batch(mesh, 6)
        return offset + jnp.arange(size)

    np.testing.assert_array_equal(on_every_device(places, mesh, parts_along(axis=0))(), np.arange(6))


def test_the_sum_keeps_types_and_shapes(mesh):
    def summed(tree):
        return sum_over_devices(jax.tree.map(lambda x: x * (1 + jax.lax.axis_index("devices").astype(x.dtype)), tree))

    tree = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.int32(7)}
    result = on_every_device(summed, mesh, SAME)(tree)
    np.testing.assert_array_equal(result["a"], 3 * tree["a"])
    assert result["b"] == 21
    assert result["b"].dtype == jnp.int32


def train(dataset, monkeypatch, devices):
    monkeypatch.setattr(sharding, "MIN_PART", CONFIG.batch_size // devices)
    trainer = Trainer(CONFIG, dataset)
    assert trainer.mesh.size == devices
    *_, (record, progress) = trainer.epochs(trainer.start())
    return record, jax.device_get(progress.state.params)


def test_two_devices_compute_what_one_does(dataset, monkeypatch):
    (one, params1), (two, params2) = (train(dataset, monkeypatch, devices) for devices in (1, 2))
    assert one.total_correct == two.total_correct
    assert one.loss == pytest.approx(two.loss, rel=1e-4)
    assert one.test_loss == pytest.approx(two.test_loss, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params1, params2)


def test_the_devices_exchange_one_sum_a_step(dataset, monkeypatch):
    """Each exchange is a wait for all: gradients, loss and count go together."""
    monkeypatch.setattr(sharding, "MIN_PART", 10)
    trainer = Trainer(CONFIG, dataset)
    start = trainer.start()
    order = trainer._order(epoch=0)
    steps = jax.device_put((np.int32(0), np.int32(3)), order.sharding)
    program = loop.train_chunk.lower(
        start.state, start.metrics, *trainer._train, order, *steps, batch_size=20, mesh=trainer.mesh
    ).compile()
    assert program.as_text().count(" all-reduce(") == 1


def test_evaluation_takes_any_number_of_examples(dataset, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_PART", 10)
    for count in (1, 19, 23):
        test = dataclasses.replace(dataset.test, images=dataset.test.images[:count], labels=dataset.test.labels[:count])
        trainer = Trainer(CONFIG, dataclasses.replace(dataset, test=test))
        params = trainer.start().state.params
        metrics, logits = jax.device_get(trainer.evaluate(params))
        expected = CNN(3).apply({"params": jax.device_get(params)}, test.images.astype(np.float32) / 255)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert metrics.num_examples == count
