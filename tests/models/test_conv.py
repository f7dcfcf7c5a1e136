from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.models import create_model
from cnn_jax.models.conv import Conv, max_pool

needs_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the lowering for CPUs")

SHAPES = [
    # image, kernel, input channels, output channels, batch
    ((7, 9), (1, 1), 3, 2, 2),
    ((7, 9), (2, 2), 1, 3, 5),
    ((9, 7), (3, 3), 4, 1, 3),
    ((12, 12), (5, 5), 6, 12, 5),
    ((11, 8), (5, 5), 1, 6, 1),
    ((10, 9), (7, 7), 2, 16, 2),
    ((8, 8), (3, 5), 3, 8, 4),
    ((9, 6), (1, 4), 2, 5, 1),
    ((6, 9), (6, 2), 16, 4, 2),
    ((3, 5), (3, 3), 1, 1, 1),
]
EVERY_SHAPE = pytest.mark.parametrize(("size", "kernel", "channels", "features", "batch"), SHAPES)
EVERY_PADDING = pytest.mark.parametrize("padding", ["VALID", "SAME"])


def case(size, kernel, channels, features, batch, draw):
    """An image batch and the parameters of its convolution."""
    params = {"kernel": draw((*kernel, channels, features)), "bias": draw((features,))}
    return draw((batch, *size, channels)), params


def reference(x, params, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), padding, dimension_numbers=numbers)
    return y + params["bias"]


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, x, params):
    """The function's value, and its gradients with respect to the images and the parameters for some cotangent."""
    value, pull_back = jax.vjp(function, x, params)
    return value, pull_back(jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))


def assert_same(ours, theirs, rtol):
    """Relative to the largest number of each array, as sums that cancel lose the smallest ones' last digits."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(initial=0)), ours, theirs
    )


@EVERY_PADDING
@EVERY_SHAPE
def test_values_and_gradients_are_the_convolutions(size, kernel, channels, features, batch, padding):
    def draw(shape):
        return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)

    x, params = case(size, kernel, channels, features, batch, draw)
    conv = Conv(features, kernel, padding)
    ours = value_and_gradients(lambda x, params: conv.apply({"params": params}, x), x, params)
    theirs = value_and_gradients(partial(reference, padding=padding), x, params)
    assert_same(ours, theirs, rtol=1e-5)


@EVERY_PADDING
@EVERY_SHAPE
def test_relu_and_pooling_in_one_are_the_two_in_turn(size, kernel, channels, features, batch, padding):
    def draw(shape):
        # Integers, with which float32 is exact: else rounding would now and then decide which of two is the maximum.
        # Large ones, so that no two are equal: max_pool shares out the gradient, relu_pool gives it to the first.
        return np.random.default_rng(len(shape)).integers(-700, 700, shape).astype(np.float32)

    x, params = case(size, kernel, channels, features, batch, draw)
    conv = Conv(features, kernel, padding, relu_pool=True)
    ours = value_and_gradients(lambda x, params: conv.apply({"params": params}, x), x, params)
    theirs = value_and_gradients(lambda x, params: max_pool(nn.relu(reference(x, params, padding))), x, params)
    assert_same(ours, theirs, rtol=1e-6)


def test_many_networks_at_once():
    def draw(shape):
        return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)

    conv = Conv(2, (3, 3), relu_pool=True)
    x, params = draw((2, 6, 6, 1)), {"kernel": draw((3, 3, 3, 1, 2)), "bias": draw((3, 2))}
    gradient = jax.jit(jax.grad(lambda params: conv.apply({"params": params}, x).sum()))
    together = jax.jit(jax.vmap(gradient))(params)
    in_turn = [gradient({name: values[i] for name, values in params.items()}) for i in range(3)]
    assert_same(together, jax.tree.map(lambda *values: jnp.stack(values), *in_turn), rtol=1e-5)


def test_max_pool_by_hand():
    rows = [
        [1, 2, 5, 0, 9],
        [3, 4, 6, 7, 9],
        [-1, -2, 0, 0, 9],
        [-4, -3, 0, 8, 9],
        [9, 9, 9, 9, 9],
    ]
    x = jnp.asarray(rows, jnp.float32)[None, :, :, None]
    np.testing.assert_array_equal(max_pool(x)[0, :, :, 0], [[4, 7], [-1, 8]])  # the odd row and column left out


@pytest.mark.parametrize(("height", "width"), [(4, 5), (5, 4), (3, 3), (2, 2)])
def test_max_pool_leaves_out_an_odd_last_row_and_column(height, width):
    x = np.random.default_rng(0).standard_normal((2, height, width, 3), np.float32)
    pooled = max_pool(jnp.asarray(x))
    assert pooled.shape == (2, height // 2, width // 2, 3)
    for i, j in np.ndindex(height // 2, width // 2):
        np.testing.assert_array_equal(pooled[:, i, j], x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2)))


@pytest.mark.parametrize("pool", ["max_pool", "relu_pool"])
def test_equal_members_of_a_pool_share_one_gradient(pool):
    x = jnp.ones((1, 4, 4, 1))
    identity = {"params": {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.zeros(1)}}
    function = {"max_pool": max_pool, "relu_pool": lambda x: Conv(1, (1, 1), relu_pool=True).apply(identity, x)}[pool]
    gradient = jax.grad(lambda x: function(x).sum())(x)
    np.testing.assert_array_equal(gradient.reshape(2, 2, 2, 2).sum((1, 3)), np.ones((2, 2)))


def test_no_gradient_where_relu_is_zero():
    x = -jnp.ones((1, 2, 2, 1))
    identity = {"params": {"kernel": jnp.ones((1, 1, 1, 1)), "bias": jnp.ones(1)}}
    gradient = jax.grad(lambda x: Conv(1, (1, 1), relu_pool=True).apply(identity, x).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


def lesson_step():
    """``value_and_grad`` of the lesson's network, and arguments for it."""
    model = create_model("cnn", 10)
    images, labels = jnp.zeros((2, 28, 28, 1)), jnp.zeros(2, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def loss(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, images), labels).mean()

    return jax.jit(jax.value_and_grad(loss)), (params, images, labels)


@needs_cpu
def test_on_cpu_no_convolution_is_left():
    step, arguments = lesson_step()
    assert "convolution(" not in step.lower(*arguments).compile().as_text()


@needs_cpu
def test_on_cpu_no_gradient_of_the_images_is_computed():
    step, arguments = lesson_step()
    # The tiles' gradients are added up in a loop: conv2's alone. Each layer's tiles are cut in one.
    assert step.lower(*arguments).as_text().count("stablehlo.while") == 3


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_elsewhere_it_is_the_plain_convolution(platform):
    step, arguments = lesson_step()
    text = step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    # Forward, and backward with respect to each layer's kernel and to conv2's input.
    assert text.count("stablehlo.convolution") == 5
    assert "stablehlo.while" not in text


def test_initialised_as_pytorch():
    # Unoptimised: XLA's CPU compiler takes seconds to optimise the generator of random numbers.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.vmap
    def draw(key):
        return Conv(16, (3, 5)).init(key, jnp.zeros((1, 8, 8, 20)))["params"]

    params = draw(jax.random.split(jax.random.key(0), 100))
    bound = (3 * 5 * 20) ** -0.5
    for values in (np.asarray(params["kernel"], np.float64), np.asarray(params["bias"], np.float64)):
        assert np.abs(values).max() <= bound
        # The sample variance of n uniform draws has a relative standard deviation of sqrt(0.8 / n): kurtosis 9/5.
        assert values.var() == pytest.approx(bound**2 / 3, rel=5 * (0.8 / values.size) ** 0.5)
        assert values.mean() == pytest.approx(0, abs=5 * (bound**2 / 3 / values.size) ** 0.5)


@EVERY_PADDING
@pytest.mark.parametrize("relu_pool", [False, True])
def test_parameters_are_those_of_flax(padding, relu_pool):
    x, key = jnp.zeros((1, 8, 9, 3)), jax.random.key(0)
    ours = jax.eval_shape(Conv(4, (3, 5), padding, relu_pool).init, key, x)
    assert ours == jax.eval_shape(nn.Conv(4, (3, 5), padding=padding).init, key, x)
