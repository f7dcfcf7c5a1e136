import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models import create_model
from cnn_jax.training.state import create_train_state
from cnn_jax.training.step import Batch, cross_entropy, eval_step, loss_fn, num_correct, scale, train_step


@pytest.fixture
def state():
    return create_train_state(create_model("cnn", 3), (16, 16, 1), 0.01, jax.random.key(0))


@pytest.fixture
def batch(dataset):
    split = dataset.train
    return Batch.of(jnp.asarray(split.images[:10]), jnp.asarray(split.labels[:10]))


def test_loss_decreases_after_one_step(state, batch):
    state, metrics1 = train_step(state, batch)
    _, metrics2 = train_step(state, batch)
    assert metrics2.loss < metrics1.loss


def test_scale_is_division_by_255():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(scale(jnp.asarray(levels)), levels / np.float32(255), rtol=1e-7)


def test_cross_entropy_by_hand():
    # softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 2])), [np.log(8), np.log(8 / 5)], rtol=1e-6)


def test_num_correct_by_hand():
    logits = jnp.array([[3.0, 1.0], [0.0, 2.0], [1.0, 4.0]])
    labels = jnp.array([0, 0, 1])
    assert num_correct(logits, labels) == 2
    assert num_correct(logits, labels, jnp.array([True, True, False])) == 1


def test_untrained_loss_is_near_chance(state, batch):
    loss, logits = loss_fn(state.params, state.apply_fn, batch)
    assert logits.shape == (10, 3)
    assert loss == pytest.approx(np.log(3), rel=0.2)


def test_padding_changes_nothing(state, batch):
    """A padded batch has the loss, the gradients and the counts of the short batch it stands for."""
    short = Batch.of(batch.images[:7], batch.labels[:7])
    padded = batch._replace(mask=jnp.arange(10) < 7, num_examples=jnp.int32(7))
    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=1)
    (loss, _), grads = grad(state.params, state.apply_fn, padded)
    (expected_loss, _), expected_grads = grad(state.params, state.apply_fn, short)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grads, expected_grads)
    _, metrics = train_step(jax.tree.map(jnp.copy, state), padded)
    _, expected = train_step(state, short)
    assert metrics.num_examples == expected.num_examples == 7
    assert metrics.num_correct == expected.num_correct
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)


def test_train_step_is_adam_on_the_gradient_of_the_loss(state, batch):
    """The update is Adam's first step by hand: -learning_rate * g / (|g| + eps)."""
    before = jax.tree.map(np.array, state.params)
    grads = jax.grad(lambda params: loss_fn(params, state.apply_fn, batch)[0])(state.params)
    state, metrics = train_step(state, batch)
    assert state.step == 1
    assert metrics.num_examples == 10

    def check(old, grad, new):
        grad = np.asarray(grad, np.float64)
        np.testing.assert_allclose(new, old - 0.01 * grad / (np.abs(grad) + 1e-8), atol=2e-6)

    jax.tree.map(check, before, grads, state.params)


def test_eval_step_is_the_forward_pass(state, batch):
    logits = eval_step(state.params, state.apply_fn, batch.images)
    expected = state.apply_fn({"params": state.params}, np.asarray(batch.images, np.float32) / 255)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_losses_and_gradients_of_parts_add_up(state, batch):
    """The second part is two examples and three that do not count: what counts is the size of the whole."""
    batch = batch._replace(mask=jnp.arange(10) < 7, num_examples=jnp.int32(7))
    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=1)
    (loss, _), grads = grad(state.params, state.apply_fn, batch)
    parts = [
        batch._replace(images=batch.images[s], labels=batch.labels[s], mask=batch.mask[s])
        for s in (slice(0, 5), slice(5, 10))
    ]
    (loss1, _), grads1 = grad(state.params, state.apply_fn, parts[0])
    (loss2, _), grads2 = grad(state.params, state.apply_fn, parts[1])
    np.testing.assert_allclose(loss1 + loss2, loss, rtol=1e-6)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-4, atol=1e-7), grads1, grads2, grads)
