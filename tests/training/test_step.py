import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models import create_model
from cnn_jax.models.layers import BatchContext
from cnn_jax.training.augment import Augment, Mixed
from cnn_jax.training.metrics import CrossEntropy, num_correct
from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.step import Batch, train_step
from cnn_jax.training.step import loss_fn as loss_of_task
from cnn_jax.training.task import SCALE, Task

TASK = Task(create_model("cnn", 3), Optimizer())
KEY = jax.random.key(1)


create = jax.jit(Task.init, static_argnums=(0, 2))


def init(task, seed=0):
    return create(task, jax.random.key(seed), (16, 16, 1))


@jax.jit
def loss_fn(params, batch):
    """The loss and the logits of a network that has no other state than its parameters."""
    loss, (logits, model_state) = loss_of_task(params, {}, TASK, batch, KEY)
    assert model_state == {}
    return loss, logits


loss_and_gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@pytest.fixture
def state():
    return init(TASK)


@pytest.fixture
def batch(dataset):
    split = dataset.train
    return Batch.of(jnp.asarray(split.images[:10]), jnp.asarray(split.labels[:10]))


def test_loss_decreases_after_one_step(state, batch):
    state, metrics1 = train_step(state, batch, KEY, 0.01, task=TASK)
    _, metrics2 = train_step(state, batch, KEY, 0.01, task=TASK)
    assert metrics2.loss < metrics1.loss


def test_scale_is_division_by_255():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(SCALE(levels), levels / np.float32(255), rtol=1e-7)


def test_cross_entropy_by_hand():
    # softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(CrossEntropy()(logits, jnp.array([0, 2])), [np.log(8), np.log(8 / 5)], rtol=1e-6)


def test_num_correct_by_hand():
    logits = jnp.array([[3.0, 1.0], [0.0, 2.0], [1.0, 4.0]])
    labels = jnp.array([0, 0, 1])
    assert num_correct(logits, labels) == 2
    assert num_correct(logits, labels, jnp.array([True, True, False])) == 1


def test_untrained_loss_is_near_chance(state, batch):
    loss, logits = loss_fn(state.params, batch)
    assert logits.shape == (10, 3)
    assert loss == pytest.approx(np.log(3), rel=0.2)


def test_padding_does_not_change_the_update(state, batch):
    """A padded batch has the loss, the gradients and the counts of the short batch it stands for."""
    short = Batch.of(batch.images[:7], batch.labels[:7])
    padded = batch._replace(mask=jnp.arange(10) < 7, num_examples=jnp.int32(7))
    (loss, _), grads = loss_and_gradients(state.params, padded)
    (expected_loss, _), expected_grads = loss_and_gradients(state.params, short)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, expected_grads)
    _, metrics = train_step(jax.tree.map(jnp.copy, state), padded, KEY, 0.01, task=TASK)
    _, expected = train_step(state, short, KEY, 0.01, task=TASK)
    assert metrics.num_examples == expected.num_examples == 7
    assert metrics.num_correct == expected.num_correct
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)


def test_padding_is_never_correct(state, batch):
    """Not even if its labels are what the network predicts."""
    _, logits = loss_fn(state.params, batch)
    predicted = batch._replace(labels=logits.argmax(axis=-1).astype(jnp.int32))
    padded = predicted._replace(mask=jnp.arange(10) < 7, num_examples=jnp.int32(7))
    _, metrics = train_step(state, padded, KEY, 0.01, task=TASK)
    assert metrics.num_correct == 7


def test_train_step_is_adam_on_the_gradient_of_the_loss(state, batch):
    """The update is Adam's first step by hand: -learning_rate * g / (|g| + eps)."""
    before = jax.tree.map(np.array, state.params)
    _, grads = loss_and_gradients(state.params, batch)
    state, metrics = train_step(state, batch, KEY, 0.01, task=TASK)
    assert state.step == 1
    assert metrics.num_examples == 10

    def check(old, grad, new):
        grad = np.asarray(grad, np.float64)
        np.testing.assert_allclose(new, old - 0.01 * grad / (np.abs(grad) + 1e-8), atol=2e-6)

    jax.tree.map(check, before, grads, state.params)


def test_inference_is_the_forward_pass(state, batch):
    logits = jax.jit(TASK.logits)(state.variables, batch.images)
    expected = jax.jit(TASK.model.apply)({"params": state.params}, np.asarray(batch.images, np.float32) / 255)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_losses_and_gradients_of_parts_add_up(state, batch):
    """The second part is two examples and three that do not count: what counts is the size of the whole."""
    batch = batch._replace(mask=jnp.arange(10) < 7, num_examples=jnp.int32(7))
    (loss, _), grads = loss_and_gradients(state.params, batch)
    parts = [
        batch._replace(images=batch.images[s], labels=batch.labels[s], mask=batch.mask[s])
        for s in (slice(0, 5), slice(5, 10))
    ]
    (loss1, _), grads1 = loss_and_gradients(state.params, parts[0])
    (loss2, _), grads2 = loss_and_gradients(state.params, parts[1])
    np.testing.assert_allclose(loss1 + loss2, loss, rtol=1e-6)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-7), grads1, grads2, grads)


class Recorder(nn.Module):
    """A model whose logits are its bias, and that remembers how many images it was given."""

    @nn.compact
    def __call__(self, images, batch=None):
        seen = self.variable("counts", "seen", lambda: jnp.int32(0))
        if batch is not None:
            seen.value += batch.mask.sum()
        return self.param("bias", nn.initializers.zeros, (3,)) + jnp.zeros((len(images), 1))


def test_other_collections_are_part_of_the_state(batch):
    task = Task(Recorder(), Optimizer())
    state = jax.jit(lambda: task.init(KEY, (16, 16, 1)))()
    assert state.model_state == {"counts": {"seen": 0}}
    for expected in (10, 20):
        state, _ = train_step(state, batch, KEY, 0.01, task=task)
        assert state.model_state["counts"]["seen"] == expected
    logits = task.logits(state.variables, batch.images)
    np.testing.assert_allclose(logits, np.tile(state.params["bias"], (10, 1)))


def test_averaged_params_are_the_exponential_moving_average(state, batch):
    task = dataclasses.replace(TASK, average_decay=0.9)
    state = init(task)
    expected = np.array(state.params["out"]["bias"], np.float64)
    for decay in (1 / 10, 2 / 11, 3 / 12):  # not 0.9 before the start is forgotten
        state, _ = train_step(state, batch, KEY, 0.01, task=task)
        expected = decay * expected + (1 - decay) * np.array(state.params["out"]["bias"], np.float64)
    np.testing.assert_allclose(state.averaged_params["out"]["bias"], expected, rtol=1e-5)
    assert state.variables["params"] is state.averaged_params


@dataclasses.dataclass(frozen=True)
class Noise(Augment):
    """Augmentation that replaces images by noise, which it reports."""

    report: Callable = print

    def __call__(self, images, labels, keys, epoch):
        new = jax.vmap(lambda key: jax.random.bits(key, images.shape[1:], jnp.uint8))(keys)
        jax.debug.callback(lambda images: self.report(np.array(images)), new)
        return Mixed(new, labels, jnp.ones(len(labels)))


def test_keys_differ_by_example_and_step(batch):
    """Augmentation is a pure function of the run's key, the step and the place in the batch."""
    noise = []
    task = dataclasses.replace(TASK, augment=Noise(report=noise.append))
    state = init(task)
    for run in range(2):
        new_state = jax.tree.map(jnp.copy, state)
        for _ in range(2):
            new_state, _ = train_step(new_state, batch, jax.random.key(0), 0.01, task=task)
        jax.effects_barrier()
        assert len(noise) == 2 * (run + 1)
    np.testing.assert_array_equal(noise[0], noise[2])
    np.testing.assert_array_equal(noise[1], noise[3])
    images = np.concatenate(noise[:2])
    assert len({image.tobytes() for image in images}) == 20


def test_the_loss_of_a_mixture_is_the_mixture_of_the_losses(state, batch):
    pair = Batch.of(batch.images[:2], batch.labels[:2])
    task = dataclasses.replace(TASK, augment=Augment(mixup=1.0))
    loss, (logits, _) = loss_of_task(state.params, {}, task, pair, KEY)
    keys = BatchContext(jnp.arange(2), pair.mask).keys(jax.random.split(KEY)[0])
    mixed = task.augment(pair.images, pair.labels, keys, pair.epoch)
    log_probabilities = jax.nn.log_softmax(TASK.logits({"params": state.params}, mixed.images))
    np.testing.assert_allclose(jax.nn.log_softmax(logits), log_probabilities, rtol=1e-5)
    weight, own, other = (np.array(values) for values in (mixed.weight, pair.labels, pair.labels[::-1]))
    losses = -weight * log_probabilities[[0, 1], own] - (1 - weight) * log_probabilities[[0, 1], other]
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    assert (weight > 0).all()
    assert (weight < 1).all()


def test_equal_tasks_share_a_program_for_any_learning_rate(batch):
    """Nothing but equality counts: both tasks are made from scratch."""
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **details: (
            compilations.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    tasks = [Task(create_model("cnn", 3), Optimizer("sgd", momentum=0.7)) for _ in range(2)]
    assert hash(tasks[0]) == hash(tasks[1])
    states = [init(tasks[0], seed) for seed in range(2)]
    train_step(states[0], batch, KEY, 0.01, task=tasks[0])
    count = len(compilations)
    assert count > 0
    train_step(states[1], batch, KEY, 0.003, task=tasks[1])
    assert len(compilations) == count
