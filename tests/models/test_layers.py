"""Batch normalization and dropout, on one device and on several."""

import os
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.models.layers import BatchContext, BatchNorm, Dense, Dropout, add_bias

SHAPES = pytest.mark.parametrize("shape", [(6, 5, 7, 3), (8, 4), (2, 1, 1, 5)])


def draw(shape, seed=0):
    """Numbers whose mean is large compared to their standard deviation."""
    return jnp.asarray(np.random.default_rng(seed).normal(3, 0.5, shape), jnp.float32)


def whole_batch(n, mask=None):
    return BatchContext(jnp.arange(n), jnp.ones(n, bool) if mask is None else jnp.asarray(mask))


def initial(x):
    """Variables of a BatchNorm, with parameters that are neither zero nor one."""
    features = x.shape[-1]
    params = {"scale": jnp.linspace(0.5, 2, features), "bias": jnp.linspace(-1, 1, features)}
    return params, {"mean": jnp.zeros(features), "var": jnp.ones(features)}


def normalize(layer, params, stats, x, batch):
    y, new = layer.apply({"params": params, "batch_stats": stats}, x, batch, mutable="batch_stats")
    return y, new["batch_stats"]


def cotangent(shape):
    return jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)


@jax.jit
def value_and_gradients(params, stats, x, batch):
    """Output, new statistics, and gradients of a weighted sum over the real examples."""
    weights = jnp.where(batch.mask.reshape(-1, *[1] * (x.ndim - 1)), cotangent(x.shape), 0)

    def loss(params, x):
        y, new = normalize(BatchNorm(), params, stats, x, batch)
        return jnp.sum(y * weights), (y, new)

    gradients, (y, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, new, gradients


def assert_close(ours, theirs, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1, np.abs(b).max(initial=0))),
        ours,
        theirs,
    )


def test_batch_norm_by_hand():
    x = jnp.asarray([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0], [100.0, 100.0]])
    batch = whole_batch(4, [True, True, True, False])
    params = {"scale": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray([0.0, 1.0])}
    stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}
    y, new = normalize(BatchNorm(epsilon=0.0), params, stats, x, batch)
    # Means 3 and 20, variances 8/3 and 200; the unbiased ones, which are averaged, 4 and 300.
    np.testing.assert_allclose(y[:3, 0], [-((3 / 2) ** 0.5), 0, (3 / 2) ** 0.5], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(y[:3, 1], [1 - 2**0.5, 1 - 2**0.5, 1 + 2 * 2**0.5], rtol=1e-6)
    np.testing.assert_allclose(new["mean"], [0.3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(new["var"], [0.9 + 0.4, 0.9 + 30], rtol=1e-6)
    y = BatchNorm(epsilon=0.0).apply({"params": params, "batch_stats": {"mean": x[0], "var": x[1]}}, x)
    np.testing.assert_allclose(y[2], [4 / 3**0.5, 2 * 30 / 10**0.5 + 1], rtol=1e-6)


def test_batch_norm_gradient_by_finite_differences():
    x, batch = draw((4, 2, 3)), whole_batch(4, [True, False, True, True])
    params, stats = initial(x)
    weights = np.where(np.asarray(batch.mask)[:, None, None], cotangent(x.shape), 0).astype(np.float64)

    def loss(params, x):
        """In float64, by numpy."""
        real = x[np.asarray(batch.mask)]
        normal = (x - real.mean((0, 1))) / np.sqrt(real.var((0, 1)) + 1e-5)
        return np.sum((normal * params["scale"] + params["bias"]) * weights)

    def differences(function, at, step=1e-5):
        result = np.zeros(at.shape)
        for index in np.ndindex(at.shape):
            change = np.zeros(at.shape)
            change[index] = step
            result[index] = (function(at + change) - function(at - change)) / (2 * step)
        return result

    wide, at = {name: np.asarray(value, np.float64) for name, value in params.items()}, np.asarray(x, np.float64)
    expected_params = {
        name: differences(lambda value, name=name: loss(wide | {name: value}, at), wide[name]) for name in wide
    }
    expected = (expected_params, differences(lambda value: loss(wide, value), at))
    assert_close(value_and_gradients(params, stats, x, batch)[2], expected)


@SHAPES
def test_batch_norm_agrees_with_pytorch(shape):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(shape[-1])
    params, stats = initial(jnp.zeros(shape))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(np.asarray(params["scale"])))
        layer.bias.copy_(torch.tensor(np.asarray(params["bias"])))

    def to_torch(values):
        values = np.asarray(values).reshape(shape if len(shape) == 4 else (shape[0], 1, 1, shape[1]))
        return torch.tensor(values.transpose(0, 3, 1, 2))

    def from_torch(values):
        return values.detach().numpy().transpose(0, 2, 3, 1).reshape(shape)

    for step in range(3):
        x = draw(shape, seed=step)
        y, stats, (param_gradients, x_gradient) = value_and_gradients(params, stats, x, whole_batch(shape[0]))
        theirs = to_torch(x).requires_grad_()
        layer.zero_grad()
        out = layer(theirs)
        (out * to_torch(cotangent(shape))).sum().backward()
        assert_close(y, from_torch(out))
        assert_close(stats, {"mean": layer.running_mean.numpy(), "var": layer.running_var.numpy()})
        assert_close(param_gradients, {"scale": layer.weight.grad.numpy(), "bias": layer.bias.grad.numpy()})
        # With two examples, the gradient is a difference of nearly equal numbers, in PyTorch too.
        assert_close(x_gradient, from_torch(theirs.grad), rtol=1e-4)
    layer.eval()
    y = BatchNorm().apply({"params": params, "batch_stats": stats}, x)
    assert_close(y, from_torch(layer(to_torch(x))))


def test_batch_norm_statistics_do_not_cancel():
    x = np.random.default_rng(0).normal(1000, 0.1, (50, 28, 28, 2)).astype(np.float32)
    params, stats = initial(x)
    _, new = jax.jit(partial(normalize, BatchNorm(momentum=0.0)))(params, stats, jnp.asarray(x), whole_batch(50))
    np.testing.assert_allclose(new["mean"], x.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(new["var"], x.astype(np.float64).var((0, 1, 2), ddof=1), rtol=1e-3)


def test_batch_norm_of_bfloat16_has_float32_statistics():
    x = draw((32, 8, 8, 2)).astype(jnp.bfloat16)
    params, stats = initial(x)
    y, new = normalize(BatchNorm(), params, stats, x, whole_batch(32))
    exact, exact_new = normalize(BatchNorm(), params, stats, x.astype(jnp.float32), whole_batch(32))
    assert y.dtype == jnp.bfloat16
    assert_close(new, exact_new)
    assert {value.dtype for value in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def test_batch_norm_variables_are_those_of_flax():
    x = jnp.zeros((2, 4, 4, 3))
    theirs = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    for batch in (None, whole_batch(2)):
        ours = BatchNorm().init(jax.random.key(0), x, batch)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)  # also that init does not update the averages


def test_padding_examples_do_not_count():
    x, mask = draw((5, 3, 3, 2)), [True, True, False, True, False]
    params, stats = initial(x)
    real = np.flatnonzero(mask)
    y, new, gradients = value_and_gradients(params, stats, x, whole_batch(5, mask))
    other = x.at[jnp.asarray([2, 4])].set(1e6)
    other_y, other_new, other_gradients = value_and_gradients(params, stats, other, whole_batch(5, mask))
    expected_y, expected_new = normalize(BatchNorm(), params, stats, x[real], whole_batch(3))
    assert_close(new, expected_new)
    assert_close(y[real], expected_y)
    np.testing.assert_array_equal(y[real], other_y[real])
    jax.tree.map(np.testing.assert_array_equal, (new, gradients), (other_new, other_gradients))
    np.testing.assert_array_equal(gradients[1][jnp.asarray([2, 4])], 0)


def test_mean_over_real_examples():
    batch = whole_batch(3, [True, False, True])
    x = jnp.asarray([[1, 2], [100, 100], [5, 8]])
    np.testing.assert_array_equal(batch.mean(x), [3, 5])
    assert batch.mean(x[:, 0] > 1) == 0.5
    assert batch.num_examples() == 2


def test_a_single_number_does_not_change_the_running_averages():
    """PyTorch refuses it; here it may be the last batch of an epoch."""
    x = jnp.ones((1, 1, 1, 2))
    variables = BatchNorm().init(jax.random.key(0), x)
    _, new = BatchNorm().apply(variables, x, whole_batch(1, [True]), mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    x, batch = jnp.ones((64, 10, 10)), whole_batch(64)
    drop = jax.jit(lambda x: Dropout(rate).apply({}, x, batch, rngs={"dropout": jax.random.key(0)}))
    y = np.asarray(drop(x))
    values = np.float32(1) / np.float32(1 - rate)
    assert set(np.unique(y)) == {np.float32(0), values}
    deviation = (rate * (1 - rate) / y.size) ** 0.5
    assert (y == 0).mean() == pytest.approx(rate, abs=4 * deviation)
    assert len(np.unique((y == 0).reshape(64, -1), axis=0)) == 64  # no two examples drop the same
    gradient = jax.grad(lambda x: drop(x).sum())(x)
    np.testing.assert_array_equal(gradient, y)


def test_dropout_is_the_identity_in_inference_and_at_rate_zero():
    x = draw((4, 3))
    assert Dropout(0.5).apply({}, x) is x
    assert Dropout(0.0).apply({}, x, whole_batch(4)) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_invalid_dropout_rate_is_an_error(rate):
    with pytest.raises(ValueError, match="dropout rate must be at least 0 and less than 1"):
        Dropout(rate).apply({}, jnp.ones(3))


def test_dropout_depends_on_the_position_in_the_whole_batch():
    x, key = jnp.ones((6, 50)), {"dropout": jax.random.key(3)}
    whole = Dropout(0.5).apply({}, x, whole_batch(6), rngs=key)
    part = BatchContext(jnp.arange(4, 6), jnp.ones(2, bool))
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x[4:], part, rngs=key), whole[4:])


def test_batch_context_goes_through_transformations():
    batch = BatchContext(jnp.arange(2), jnp.ones(2, bool), axis_name="data")
    assert jax.jit(lambda batch: batch)(batch).axis_name == "data"
    assert len(jax.tree.leaves(batch)) == 2


def test_gradient_of_a_bfloat16_bias_is_summed_in_float32():
    x, bias = jnp.zeros((10_000, 3), jnp.bfloat16), jnp.zeros((1, 3))
    gradient = jax.jit(jax.grad(lambda bias: add_bias(x, bias).astype(jnp.float32).sum()))(bias)
    np.testing.assert_array_equal(gradient, jnp.full((1, 3), 10_000))


@pytest.mark.parametrize(
    ("dtype", "input_dtype", "expected"),
    [
        (None, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_dense_types_are_those_of_flax(dtype, input_dtype, expected):
    x = draw((4, 6)).astype(input_dtype)
    variables = Dense(3).init(jax.random.key(0), x)
    y = Dense(3, dtype=dtype).apply(variables, x)
    theirs = nn.Dense(3, dtype=dtype).apply(variables, x)
    assert y.dtype == theirs.dtype == expected
    assert_close(y.astype(jnp.float32), theirs.astype(jnp.float32), rtol=1e-2)


class Network(nn.Module):
    """Normalization and dropout in turn."""

    @nn.compact
    def __call__(self, x, batch=None):
        x = BatchNorm(name="norm1")(x, batch)
        x = Dropout(0.3)(jnp.tanh(x), batch)
        return BatchNorm(name="norm2")(x * x, batch)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [None, whole_batch(4)], ids=["inference", "training"])
def test_strict_promotion(dtype, batch):
    def loss(variables, x):
        y, _ = Network().apply(variables, x, batch, mutable="batch_stats", rngs={"dropout": jax.random.key(1)})
        assert y.dtype == dtype
        return y.sum()

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for shape in [(4, 3), (4, 2, 2, 3)]:
            x = jnp.ones(shape, dtype)
            variables = jax.eval_shape(Network().init, jax.random.key(0), x, batch)
            jax.eval_shape(jax.grad(loss, argnums=(0, 1)), variables, x)
            for dense in (Dense(2), Dense(2, dtype=jnp.bfloat16)):
                jax.eval_shape(dense.init_with_output, jax.random.key(0), x)


def check_devices():
    """Results on 1, 2, 3 and 8 devices equal those on one without a mapped axis; run where there are eight."""
    assert jax.device_count() == 8
    spec, all_same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    size, real = 24, 11
    scattered = np.random.default_rng(0).permutation(size) < real
    masks = {"scattered": scattered, "padded at the end": np.arange(size) < real, "all real": np.arange(size) < size}
    x = draw((size, 3, 2, 4))
    variables = Network().init(jax.random.key(0), x)
    variables = {
        "params": jax.tree.map(lambda p: p + 0.3, variables["params"]),
        "batch_stats": variables["batch_stats"],
    }

    def gradients(params, x, positions, mask, axis_name):
        batch = BatchContext(positions, mask, axis_name)

        def loss(params, x):
            y, new = Network().apply(
                {**variables, "params": params}, x, batch, mutable="batch_stats", rngs={"dropout": jax.random.key(1)}
            )
            losses = jnp.cos(positions.astype(jnp.float32)) * (y @ jnp.arange(1.0, 5.0)).sum((1, 2))
            return jnp.where(mask, losses, 0).sum() / batch.num_examples(), (y, new, batch.mean(losses))

        (_, (y, new, mean)), (of_params, of_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return of_params, of_x, jnp.where(mask.reshape(-1, 1, 1, 1), y, 0), new, mean

    for name, mask in masks.items():
        arguments = variables["params"], x, jnp.arange(size), jnp.asarray(mask)
        expected = jax.jit(gradients, static_argnums=4)(*arguments, None)
        for devices, check_vma in [(1, False), (2, False), (3, False), (8, False), (8, True)]:
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))

            def part(params, *arrays, check_vma=check_vma):
                of_params, *rest = gradients(params, *arrays, "data")
                # With the check, autodiff itself adds up the gradients of what all devices have the same.
                return of_params if check_vma else jax.lax.psum(of_params, "data"), *rest

            sharded = jax.shard_map(
                part,
                mesh=mesh,
                in_specs=(all_same, spec, spec, spec),
                out_specs=(all_same, spec, spec, all_same, all_same),
                check_vma=check_vma,
            )
            try:
                assert_close(jax.jit(sharded)(*arguments), expected)
            except AssertionError as error:
                raise AssertionError(f"{devices} devices, {name}, check_vma={check_vma}: {error}") from None


def test_results_do_not_depend_on_the_number_of_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__], check=True, env=environment, timeout=600)


if __name__ == "__main__":
    check_devices()
