"""The network ``small``; tests/test_recipe_agreement.py compares it with PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.models import create_model


@pytest.mark.parametrize(
    ("options", "channels"),
    [({}, (1, 16, 32, 64)), ({"depth": 6, "width": 5}, (1, 5, 5, 10, 10, 20, 20)), ({"depth": 9}, (1, *[16] * 3))],
)
def test_convolutions_of_each_stage(options, channels):
    model = create_model("small", 10, True, **options)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    for number, shape in enumerate(itertools.pairwise(channels), start=1):
        assert params[f"conv{number}"]["kernel"].shape == (3, 3, *shape)
    assert len(params) == 2 * model.depth + 1
    assert params["out"]["kernel"].shape == (3 * 3 * 4 * model.width, 10)  # three times halved


def test_number_of_parameters():
    params = jax.eval_shape(create_model("small", 10).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 29_290


@pytest.mark.parametrize("depth", [1, 4, 20])
def test_depths_that_stages_do_not_share_are_refused(depth):
    with pytest.raises(UsageError, match=f"--model-depth must be a multiple of 3 for .*, such as 3 or 6, not {depth}"):
        create_model("small", 10, depth=depth)
