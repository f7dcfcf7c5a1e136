import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.training.optimizer import Adam, scale_by_adam


def adam_in_float64(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """The updates of Algorithm 1 of the paper, with a learning rate of 1 and without its sign."""
    m = v = 0.0
    for t, gradient in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def test_updates_are_those_of_the_paper():
    gradients = np.random.default_rng(0).normal(size=(200, 50)).astype(np.float32)
    transformation = scale_by_adam()
    state = transformation.init(jnp.zeros(50))
    for gradient, expected in zip(gradients, adam_in_float64(gradients.astype(np.float64)), strict=True):
        updates, state = transformation.update(gradient, state)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10, 100_000])
def test_the_bias_correction_is_accurate(steps):
    """With constant moments, the update is the quotient of the corrections, to which optax's float32 adds 2e-5."""
    transformation = scale_by_adam(eps=0.0)
    state = optax.ScaleByAdamState(jnp.int32(steps - 1), mu=jnp.float32(1), nu=jnp.float32(1))
    update, _ = transformation.update(jnp.float32(1), state)
    np.testing.assert_allclose(update, np.sqrt(1 - 0.999**steps) / (1 - 0.9**steps), rtol=3e-7)


def test_equal_settings_are_equal():
    assert {Adam(0.01): 1}[Adam(0.01)] == 1
    assert Adam(0.01) != Adam(0.02)
