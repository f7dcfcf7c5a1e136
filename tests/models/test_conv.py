from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.models import create_model
from cnn_jax.models.conv import Conv, max_pool

# The programs that users run, whose rounding the tolerances are for.
pytestmark = pytest.mark.optimized

needs_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the lowering for CPUs")

SHAPES = [
    # image, kernel, input channels, output channels, batch
    ((7, 9), (1, 1), 3, 2, 2),
    ((7, 9), (2, 2), 1, 3, 5),
    ((9, 7), (3, 3), 4, 1, 3),
    ((12, 12), (5, 5), 6, 12, 5),
    ((10, 9), (7, 7), 2, 16, 2),
    ((8, 8), (3, 5), 3, 8, 4),
    ((6, 9), (6, 2), 16, 4, 2),
    ((3, 5), (3, 3), 1, 1, 1),
    ((6, 7), (3, 3), 2, 50, 3),
    ((7, 6), (3, 3), 3, 130, 2),
    ((7, 8), (3, 3), 40, 40, 2),
]
EVERY_SHAPE = pytest.mark.parametrize(("size", "kernel", "channels", "features", "batch"), SHAPES)
EVERY_PADDING = pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 1), (0, 2))])


def case(size, kernel, channels, features, batch, draw):
    """An image batch and the parameters of its convolution."""
    params = {"kernel": draw((*kernel, channels, features)), "bias": draw((features,))}
    return draw((batch, *size, channels)), params


def reference(x, params, padding, strides=(1, 1)):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["kernel"], strides, padding, dimension_numbers=numbers)
    return y + params.get("bias", 0)


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


STRIDED = [
    # image, kernel, strides, input channels, output channels, batch
    ((7, 9), (1, 1), (2, 2), 3, 2, 2),
    ((9, 7), (3, 3), (2, 2), 4, 3, 3),
    ((11, 10), (5, 5), (2, 2), 3, 2, 2),
    ((13, 12), (7, 7), (2, 2), 2, 3, 2),
    ((10, 11), (3, 5), (3, 1), 2, 2, 2),
    ((3, 3), (3, 3), (4, 4), 2, 2, 1),
]


@EVERY_PADDING
@pytest.mark.parametrize(("size", "kernel", "strides", "channels", "features", "batch"), STRIDED)
def test_strided_values_and_gradients_are_the_convolutions(size, kernel, strides, channels, features, batch, padding):
    def draw(shape):
        return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)

    x, params = case(size, kernel, channels, features, batch, draw)
    theirs = value_and_gradients(partial(reference, padding=padding, strides=strides), x, params)
    conv = Conv(features, kernel, padding, strides=strides)
    ours = value_and_gradients(lambda x, params: conv.apply({"params": params}, x), x, params)
    assert_same(ours, theirs, rtol=1e-5)
    portable = conv.clone(portable=True)
    assert_same(portable.apply({"params": params}, x), theirs[0], rtol=1e-5)


def test_stride_2_by_hand():
    x = jnp.arange(5.0).reshape(1, 1, 5, 1)
    params = {"kernel": jnp.asarray([1.0, 10.0, 100.0]).reshape(1, 3, 1, 1), "bias": jnp.asarray([0.5])}

    def convolve(padding):
        return Conv(1, (1, 3), padding, strides=(1, 2)).apply({"params": params}, x).ravel()

    np.testing.assert_array_equal(convolve("VALID"), [210.5, 432.5])
    np.testing.assert_array_equal(convolve("SAME"), [100.5, 321.5, 43.5])


@pytest.mark.parametrize(("kernel", "strides", "use_bias"), [(3, 1, False), (3, 2, True), (5, 2, False), (1, 2, True)])
def test_values_and_gradients_are_pytorchs(kernel, strides, use_bias):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 9, 10, 2), np.float32), rng.standard_normal((kernel, kernel, 2, 4), np.float32)
    params = {"kernel": weight} | ({"bias": rng.standard_normal(4, np.float32)} if use_bias else {})
    conv = Conv(4, (kernel, kernel), strides=(strides, strides), use_bias=use_bias)
    y, gradients = value_and_gradients(lambda x, params: conv.apply({"params": params}, x), x, params)
    their_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    their_weight = torch.tensor(weight.transpose(3, 2, 0, 1), requires_grad=True)
    their_bias = torch.tensor(params["bias"], requires_grad=True) if use_bias else None
    out = torch.nn.functional.conv2d(their_x, their_weight, their_bias, stride=strides).permute(0, 2, 3, 1)
    (out * torch.cos(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape)).sum().backward()
    their_params = {"kernel": their_weight.grad.permute(2, 3, 1, 0).numpy()}
    if use_bias:
        their_params["bias"] = their_bias.grad.numpy()
    theirs = out.detach().numpy(), (their_x.grad.permute(0, 2, 3, 1).numpy(), their_params)
    assert_same((y, gradients), theirs, rtol=1e-5)


@EVERY_PADDING
@pytest.mark.parametrize("relu_pool", [False, True])
def test_without_a_bias(padding, relu_pool):
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 3), np.float32)
    conv = Conv(4, (3, 3), padding, relu_pool=relu_pool, use_bias=False)
    params = conv.init(jax.random.key(0), x)["params"]
    assert list(params) == ["kernel"]

    def expected(x, params):
        y = reference(x, params, padding)
        return max_pool(nn.relu(y)) if relu_pool else y

    ours = value_and_gradients(lambda x, params: conv.apply({"params": params}, x), x, params)
    assert_same(ours, value_and_gradients(expected, x, params), rtol=1e-5)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    ("kernel", "strides", "padding"), [(1, 1, "SAME"), (3, 1, "SAME"), (5, 1, "VALID"), (3, 2, "SAME"), (7, 2, "VALID")]
)
def test_bfloat16_values_and_gradients(kernel, strides, portable, padding):
    def draw(shape):
        return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.bfloat16)

    x, rounded = case((11, 14), (kernel, kernel), 4, 3, 5, draw)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), rounded)
    conv = Conv(3, (kernel, kernel), padding, strides=(strides, strides), dtype=jnp.bfloat16, portable=portable)

    # Unoptimized: optimizing takes longer than computing.
    @partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
    def compute(function, x, params):
        y, pull_back = jax.vjp(function, x, params)
        cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, pull_back(cotangent.astype(jnp.bfloat16).astype(y.dtype))

    y, gradients = compute(lambda x, params: conv.apply({"params": params}, x), x, params)
    theirs = compute(partial(reference, padding=padding, strides=(strides, strides)), x.astype(jnp.float32), params)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda a: a.dtype, gradients) == jax.tree.map(lambda a: a.dtype, (x, params))
    assert_same(jax.tree.map(lambda a: a.astype(jnp.float32), (y, gradients)), theirs, rtol=2**-6)


def test_bfloat16_relu_pool_is_the_same_in_both_lowerings():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 20, 20, 3)), jnp.bfloat16)
    conv = Conv(4, (3, 3), relu_pool=True, dtype=jnp.bfloat16)
    params = conv.init(jax.random.key(0), x)["params"]

    def value_and_gradient(conv):
        """Of the bias only: rounding makes many members of a pool equal, whose gradients the lowerings divide."""

        def total(bias):
            y = conv.apply({"params": params | {"bias": bias}}, x)
            return y.astype(jnp.float32).sum(), y

        return jax.jit(jax.grad(total, has_aux=True))(params["bias"])

    (gradient, y), (their_gradient, their_y) = map(value_and_gradient, (conv, conv.clone(portable=True)))
    assert y.dtype == jnp.bfloat16
    assert_same(y.astype(jnp.float32), their_y.astype(jnp.float32), rtol=2**-7)
    assert_same(gradient, their_gradient, rtol=1e-3)
    assert gradient.min() > 256  # more than a sum in bfloat16 could reach


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16, jnp.uint8])
def test_types_are_those_of_flax(dtype, input_dtype):
    x = jnp.ones((1, 4, 4, 1), input_dtype)
    ours, theirs = (
        jax.eval_shape(module(2, (3, 3), dtype=dtype).init_with_output, jax.random.key(0), x)
        for module in (Conv, partial(nn.Conv, padding="VALID"))
    )
    assert ours == theirs


def test_relu_pool_with_strides_is_refused():
    with pytest.raises(ValueError, match=r"^relu_pool needs strides of \(1, 1\), got \(2, 2\)"):
        Conv(2, (3, 3), relu_pool=True, strides=(2, 2)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


@pytest.mark.parametrize("relu_pool", [False, True])
@pytest.mark.parametrize(("kernel", "strides"), [(1, 1), (3, 1), (3, 2), (1, 2)])
def test_strict_promotion(kernel, strides, relu_pool):
    conv = Conv(3, (kernel, kernel), "SAME", relu_pool and strides == 1, strides=(strides, strides))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for module in (conv, conv.clone(portable=True), conv.clone(dtype=jnp.bfloat16), conv.clone(use_bias=False)):
            for dtype in (jnp.float32, jnp.bfloat16):
                x = jnp.ones((2, 6, 6, 2), dtype)
                params = jax.eval_shape(module.init, jax.random.key(0), x)
                gradients = jax.eval_shape(
                    jax.grad(lambda params, x, m=module: m.apply(params, x).sum(), argnums=(0, 1)), params, x
                )
                assert gradients == (params, jax.eval_shape(lambda x: x, x))  # shapes and types


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


@pytest.mark.parametrize(("features", "rows"), [(16, 4 * 16), (256, 256)])
def test_a_wide_kernel_is_not_repeated_in_the_band_matrix(features, rows):
    x, conv = jnp.ones((2, 8, 8, 16)), Conv(features, (5, 5), "SAME")
    params = conv.init(jax.random.key(0), x)
    places = 16 * (36 if rows == 4 * features else 25)  # four outputs look at 6x6 places of a tile, one looks at 5x5
    assert f"f32[{rows},{places}]" in str(jax.make_jaxpr(conv.apply)(params, x))


@pytest.mark.parametrize(
    ("side", "channels", "features", "rows"), [(3, 1, 64, 4 * 64), (3, 3, 128, 4 * 128), (5, 512, 512, 512)]
)
def test_a_layer_that_pools_computes_whole_pools_unless_its_kernel_is_large(side, channels, features, rows):
    """Other outputs have to be moved to their pools, but the products of a large kernel take longer than that."""
    x = jax.ShapeDtypeStruct((2, 8, 8, channels), np.float32)
    conv = Conv(features, (side, side), "SAME", relu_pool=True)
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    places = channels * (side + 1 if rows > features else side) ** 2
    assert f"f32[{rows},{places}]" in str(jax.make_jaxpr(conv.apply)(params, x))


@pytest.mark.parametrize(
    ("channels", "features", "is_used"), [(1, 16, False), (8, 16, False), (64, 64, True), (512, 512, True)]
)
def test_winograds_algorithm_is_for_many_channels(channels, features, is_used):
    """It transforms a kernel to 4x4 matrices, and the band matrix holds it once for every output."""
    x = jax.ShapeDtypeStruct((2, 8, 8, channels), np.float32)
    conv = Conv(features, (3, 3), "SAME")
    params = jax.eval_shape(conv.init, jax.random.key(0), x)
    for dtype, expected in ((jnp.float32, is_used), (jnp.bfloat16, False)):
        program = str(jax.make_jaxpr(conv.clone(dtype=dtype).apply)(params, x))
        assert (f"f32[4,4,{features},{channels}]" in program) is expected


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
