"""Several devices share each batch, and compute the same as one."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cnn_jax.config import Config
from cnn_jax.training import loop
from cnn_jax.training.evaluation import predict_logits
from cnn_jax.training.loop import Trainer
from cnn_jax.training.sharding import AXIS, REPLICATED, data_parallel, device_index, make_mesh, padded, sum_over_devices

CONFIG = Config(epochs=2, batch_size=20, dataset="squares", seed=3)


@pytest.fixture
def mesh():
    return make_mesh()


def test_mesh_of_all_devices(mesh):
    assert mesh.size == len(jax.devices()) == 2
    assert make_mesh(jax.devices()[:1]).size == 1


@pytest.mark.parametrize(("batch_size", "expected"), [(100, 100), (101, 102), (1, 2)])
def test_padded(mesh, batch_size, expected):
    assert padded(batch_size, mesh) == expected


def test_device_index(mesh):
    indices = data_parallel(lambda: device_index(AXIS)[None], mesh, (), PartitionSpec(AXIS))()
    np.testing.assert_array_equal(indices, [0, 1])
    assert device_index(None) == 0


def test_sum_over_devices_keeps_types_and_shapes(mesh):
    def summed(tree):
        return sum_over_devices(jax.tree.map(lambda x: x * (1 + device_index(AXIS).astype(x.dtype)), tree), AXIS)

    tree = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.int32(7)}
    result = data_parallel(summed, mesh, (REPLICATED,), REPLICATED)(tree)
    np.testing.assert_array_equal(result["a"], 3 * tree["a"])
    assert result["b"] == 21
    assert result["b"].dtype == jnp.int32


@pytest.mark.optimized
def test_devices_exchange_one_sum_per_step(dataset):
    """Each exchange is a wait for all: gradients, loss and count go together."""
    trainer = Trainer(CONFIG, dataset)
    start = trainer.start()
    program = loop.train_chunk.lower(
        start.state,
        start.metrics,
        trainer._source.chunk(0, 0, 3),
        trainer.step_key,
        trainer._learning_rate,
        task=trainer.task,
        mesh=trainer.mesh,
    ).compile()
    assert program.as_text().count(" all-reduce(") == 1


def test_evaluation_of_any_number_of_examples(dataset, mesh):
    trainer = Trainer(CONFIG, dataset)
    state = trainer.start().state
    for count in (1, 19, 23):
        images = dataset.test.images[:count]
        logits = predict_logits(trainer.task, state.variables, images, batch_size=20, mesh=mesh)
        inputs = trainer.task.preprocess(images)
        expected = jax.jit(trainer.task.model.apply)({"params": jax.device_get(state.params)}, inputs)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split
from cnn_jax.models.conv import Conv
from cnn_jax.models.layers import BatchNorm, Dense, Dropout
from cnn_jax.training.augment import Augment
from cnn_jax.training.loop import Trainer
from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.task import Task

class Network(nn.Module):
    @nn.compact
    def __call__(self, images, batch=None):
        x = nn.relu(BatchNorm()(Conv(4, (3, 3), use_bias=False)(images), batch))
        return Dense(3)(Dropout(0.3)(x.reshape(len(x), -1), batch))

rng = np.random.default_rng(0)
def split(n):
    images, labels = rng.integers(0, 100, (n, 8, 8, 1), dtype=np.uint8), rng.integers(0, 3, n, dtype=np.int32)
    for image, label in zip(images, labels):
        image[2 * label : 2 * label + 2] += 100
    return Split(images, labels)
dataset = Dataset("noise", split(23), split(9), ("a", "b", "c"))
# The last batch has two examples; with eight devices most parts of it are all padding.
config = Config(dataset="noise", epochs=2, batch_size=7)
for count in (1, 2, 3, 8):
    task = Task(Network(), Optimizer(), augment=Augment(flip='random', shift=2), average_decay=0.5)
    trainer = Trainer(config, dataset, jax.devices()[:count], task)
    *_, (record, progress) = trainer.epochs(trainer.start())
    leaves = [np.array(leaf, np.float64).ravel() for leaf in jax.tree.leaves(progress.state)]
    print(json.dumps([record.total_correct, record.loss, record.test_loss, np.concatenate(leaves).tolist()]))
"""


@pytest.mark.optimized
def test_results_do_not_depend_on_the_number_of_devices():
    """With batch statistics, dropout, augmentation, and devices that have nothing but padding."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, *others = map(json.loads, done.stdout.splitlines())
    assert len(others) == 3
    for other in others:
        assert other[0] == one[0]
        np.testing.assert_allclose(other[1:3], one[1:3], rtol=1e-4)
        np.testing.assert_allclose(other[3], one[3], rtol=1e-3, atol=1e-4)


def test_two_devices_compute_the_same_as_one(dataset):
    def train(devices):
        trainer = Trainer(CONFIG, dataset, devices)
        *_, (record, progress) = trainer.epochs(trainer.start())
        return record, jax.device_get(progress.state.params)

    (one, params1), (two, params2) = train(jax.devices()[:1]), train(jax.devices())
    assert one.total_correct == two.total_correct
    assert one.loss == pytest.approx(two.loss, rel=1e-4)
    assert one.test_loss == pytest.approx(two.test_loss, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params1, params2)


@pytest.mark.parametrize("precision", ["default", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2])
def test_strict_types_and_ranks(dataset, count, precision):
    """No dtype and no rank is promoted silently."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        config = dataclasses.replace(CONFIG, precision=precision)
        trainer = Trainer(config, dataset, jax.devices()[:count])
        *_, (record, _) = trainer.epochs(trainer.start())
    assert np.isfinite(record.test_loss)
