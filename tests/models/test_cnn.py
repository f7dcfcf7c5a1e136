from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.models import create_model
from cnn_jax.models.layers import BatchContext, uniform_fan_in


@partial(jax.jit, static_argnums=(0, 1))
def params_of(shape, num_classes=10):
    return create_model("cnn", num_classes).init(jax.random.key(0), jnp.zeros((1, *shape)))["params"]


def test_number_of_parameters():
    # conv1 5*5*1*6+6, conv2 5*5*6*12+12, fc1 192*120+120, fc2 120*60+60, out 60*10+10
    assert sum(x.size for x in jax.tree.leaves(params_of((28, 28, 1)))) == 156 + 1812 + 23160 + 7260 + 610 == 32998


@pytest.mark.parametrize(("shape", "num_classes"), [((28, 28, 1), 10), ((16, 16, 3), 2), ((33, 21, 3), 100)])
def test_one_logit_per_class(shape, num_classes):
    model = create_model("cnn", num_classes)
    logits = jax.jit(model.apply)({"params": params_of(shape, num_classes)}, jnp.ones((4, *shape)))
    assert logits.shape == (4, num_classes)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(("layer", "fan_in"), [("conv1", 25), ("conv2", 150), ("fc1", 192), ("fc2", 120), ("out", 60)])
def test_initialized_like_pytorch(layer, fan_in):
    params = params_of((28, 28, 1))[layer]
    bound = fan_in**-0.5
    for values in (np.asarray(params["kernel"]), np.asarray(params["bias"])):
        assert np.abs(values).max() <= bound
    kernel = np.asarray(params["kernel"], dtype=np.float64).ravel()
    # The sample variance of n uniform draws has a relative standard deviation of sqrt(0.8 / n): kurtosis 9/5.
    assert kernel.var() == pytest.approx(bound**2 / 3, rel=5 * (0.8 / kernel.size) ** 0.5)
    assert kernel.mean() == pytest.approx(0, abs=5 * (bound**2 / 3 / kernel.size) ** 0.5)


def test_initializer_is_uniform():
    values = np.asarray(uniform_fan_in(25)(jax.random.key(1), (10_000,)), np.float64)
    assert np.abs(values).max() <= 0.2
    assert values.mean() == pytest.approx(0, abs=5 * (0.04 / 3 / values.size) ** 0.5)
    assert values.var() == pytest.approx(0.04 / 3, rel=5 * (0.8 / values.size) ** 0.5)
    # A uniform distribution's fourth moment is 9/5 of its variance squared; a normal one's would be 3.
    assert (values**4).mean() / values.var() ** 2 == pytest.approx(9 / 5, rel=0.05)


@pytest.mark.parametrize("shape", [(15, 28, 1), (28, 15, 1), (8, 8, 1)])
def test_images_too_small_are_refused(shape):
    message = (
        f"needs images of at least 16x16 pixels, not {shape[0]}x{shape[1]}: use larger images, or resize those of "
        "folder:PATH with --image-size, such as --image-size 64 64"
    )
    with pytest.raises(UsageError, match=message):
        params_of(shape)


def test_unknown_model_is_refused():
    with pytest.raises(UsageError, match="unknown model 'cmn'; did you mean 'cnn'\\?"):
        create_model("cmn", 10)


def test_equal_models_share_a_compilation():
    first, second = create_model("cnn", 10), create_model("cnn", 10)
    assert first == second
    assert hash(first) == hash(second)
    assert first != create_model("cnn", 11)
    assert first != create_model("cnn", 10, portable=True)
    traced = []

    @partial(jax.jit, static_argnums=0)
    def zeros(model):
        traced.append(model)
        return jnp.zeros(model.num_classes)

    zeros(first)
    zeros(second)
    assert len(traced) == 1


def test_batch_context_does_not_change_the_logits():
    images, params = jnp.ones((2, 16, 16, 1)), params_of((16, 16, 1))
    batch = BatchContext(jnp.arange(2), jnp.asarray([True, False]))
    model = create_model("cnn", 10)
    logits = [jax.jit(model.apply)({"params": params}, images, context) for context in (None, batch)]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("portable", [False, True])
def test_strict_promotion(portable):
    model, images = create_model("cnn", 10, portable), jnp.ones((2, 16, 16, 3))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        gradients = jax.eval_shape(jax.grad(lambda variables: model.apply(variables, images).sum()), variables)
    assert gradients == variables  # shapes and types
