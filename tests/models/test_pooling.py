import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.conv import overlapping_max_pool


@jax.jit
def value_and_gradient(x):
    value, pull_back = jax.vjp(overlapping_max_pool, x)
    return value, *pull_back(jnp.arange(1, value.size + 1, dtype=value.dtype).reshape(value.shape))


@pytest.mark.parametrize("values", [3, 1000])
@pytest.mark.parametrize("shape", [(2, 8, 7, 3), (1, 1, 2, 1), (3, 5, 6, 2)])
def test_values_and_gradients_are_pytorchs(shape, values):
    """With few values, most maxima are shared, and with large gradients that are integers, sums are exact."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(values).integers(-values, values, shape).astype(np.float32)
    value, gradient = value_and_gradient(x)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    their_value = torch.nn.functional.max_pool2d(theirs, 3, stride=2, padding=1)
    np.testing.assert_array_equal(value, their_value.detach().numpy().transpose(0, 2, 3, 1))
    weights = np.arange(1, value.size + 1, dtype=np.float32).reshape(value.shape).transpose(0, 3, 1, 2)
    their_value.backward(torch.tensor(weights))
    np.testing.assert_array_equal(gradient, theirs.grad.numpy().transpose(0, 2, 3, 1))


def test_the_result_is_nan_if_a_member_is():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 0], x[0, 3, 3] = np.nan, 5
    value, _ = value_and_gradient(x)
    np.testing.assert_array_equal(value[0, :, :, 0], [[np.nan, 0], [0, 5]])


def test_no_scatter_in_the_gradient():
    """XLA's scatter and its gradient of pooling are not deterministic on GPUs."""
    program = jax.jit(value_and_gradient).lower(jnp.zeros((2, 8, 8, 3))).as_text()
    assert "scatter" not in program
    assert "reduce_window" not in program
