"""What all networks have in common: options, frozen backbones, equality, the least size of images."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.models import MODELS, create_model
from cnn_jax.models.layers import BatchContext
from cnn_jax.models.registry import model_options

SMALL = {"wide_resnet": {"depth": 10, "width": 1, "dropout": 0.5}}
"""Options with which a network compiles quickly."""

EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def abstract(model, side, channels=1):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, channels)))


@EVERY_MODEL
def test_its_attributes(name):
    model = create_model(name, 3)
    assert name == model.NAME
    params = abstract(model, model.MIN_SIDE)["params"]
    assert params[model.HEAD]["kernel"].shape[-1] == 3


@EVERY_MODEL
def test_images_too_small_are_refused_in_one_line(name):
    side = MODELS[name].MIN_SIDE
    message = (
        f"the network {name} needs images of at least {side}x{side} pixels, not {side - 1}x{side - 1}: use larger "
        "images, or resize those of folder:PATH with --image-size, such as --image-size 64 64"
    )
    with pytest.raises(UsageError, match=message):
        abstract(create_model(name, 3), side - 1)


@EVERY_MODEL
def test_equal_arguments_give_equal_models(name):
    defaults = model_options(name)
    first, second = create_model(name, 3), create_model(name, 3, **defaults)
    assert first == second
    assert hash(first) == hash(second)
    frozen = create_model(name, 3, freeze_backbone=True)
    assert len({first, frozen, create_model(name, 4), create_model(name, 3, portable=True)}) == 4


def test_options_change_the_model():
    model = create_model("wide_resnet", 3, depth=10, width=2, dropout=0)
    assert (model.depth, model.width, model.dropout) == (10, 2, 0.0)
    assert len({model, *(dataclasses.replace(model, **{name: 22}) for name in ("depth", "width"))}) == 3
    assert model_options("wide_resnet") == {"depth": 16, "width": 4, "dropout": 0.0}
    assert model_options("cnn") == {}


@pytest.mark.parametrize("option", ["depth", "width", "dropout"])
def test_an_option_that_a_model_lacks_is_refused(option):
    message = f"the network resnet18 has no --model-{option}: leave it out, or choose one of: .*wide_resnet"
    with pytest.raises(UsageError, match=message):
        create_model("resnet18", 3, **{option: 0.5 if option == "dropout" else 16})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "--model-depth must be an integer from 1 to 1024, not 0"),
        ({"width": -1}, "--model-width must be an integer from 1 to 1024, not -1"),
        ({"dropout": 1.0}, "--model-dropout must be at least 0 and less than 1, not 1.0"),
    ],
)
def test_options_out_of_bounds_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        create_model("wide_resnet", 3, **options)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "wide_resnet"])
def test_a_frozen_backbone_has_no_gradient_and_keeps_its_statistics(name):
    model = create_model(name, 3, True, freeze_backbone=True, **SMALL.get(name, {}))
    images = jnp.asarray(np.random.default_rng(0).random((3, 16, 16, 1)), jnp.float32)
    batch = BatchContext(jnp.arange(3), jnp.ones(3, bool))
    # Numbers that are no initial values, so that what replaced them would be seen.
    variables = jax.tree.map(lambda x: 0.2 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) + 0.3, abstract(model, 16))
    params, model_state = variables["params"], {key: variables[key] for key in variables.keys() - {"params"}}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, model_state):
        logits, new = model.apply({"params": params, **model_state}, images, batch, mutable=list(model_state))
        return jnp.square(logits).sum(), (logits, new)

    (_, (logits, new)), gradients = loss(params, model_state)
    head = gradients.pop(model.HEAD)
    assert not any(np.any(gradient) for gradient in jax.tree.leaves(gradients))
    assert np.all(head["kernel"] != 0)
    jax.tree.map(np.testing.assert_array_equal, dict(new), model_state)
    inference = jax.jit(model.clone(freeze_backbone=False).apply)(variables, images)
    np.testing.assert_allclose(logits, inference, rtol=1e-5)
    backward = loss.lower(params, model_state).cost_analysis()["flops"]
    forward = jax.jit(model.apply).lower(variables, images).cost_analysis()["flops"]
    assert backward < 1.1 * forward


@EVERY_MODEL
def test_strict_promotion(name):
    model = create_model(name, 3, True, **SMALL.get(name, {}))
    images, batch = jnp.ones((2, 16, 16, 3)), BatchContext(jnp.arange(2), jnp.ones(2, bool))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(params, variables):
            variables = {**variables, "params": params}
            logits, new = model.apply(
                variables, images, batch, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
            )
            return logits.sum(), new

        gradients, new = jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"], variables)
    assert gradients == variables["params"]  # shapes and types
    assert new.get("batch_stats") == variables.get("batch_stats")
