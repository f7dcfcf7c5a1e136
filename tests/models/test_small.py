"""The network ``small``; tests/test_recipe_agreement.py compares it with PyTorch."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.models import create_model


def shapes(**options):
    model = create_model("small", 10, **options)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, (1, 16, 32, 64)),
        ({"depth": 6, "width": 5}, (1, 5, 5, 10, 10, 20, 20)),
        ({"depth": 9, "width": 2}, (1, 2, 2, 2, 4, 4, 4, 8, 8, 8)),
    ],
)
def test_convolutions_of_each_stage(options, channels):
    params = shapes(**options)
    for number, shape in enumerate(itertools.pairwise(channels), start=1):
        assert params[f"conv{number}"]["kernel"].shape == (3, 3, *shape)
    assert len(params) == 2 * (len(channels) - 1) + 1
    assert params["out"]["kernel"].shape == (3 * 3 * channels[-1], 10)  # 28 pixels, three times halved


def test_number_of_parameters():
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes())) == 29_290


@pytest.mark.parametrize("depth", [1, 4, 20])
def test_depths_that_stages_do_not_share_are_refused(depth):
    message = f"--model-depth must be a multiple of 3 for the network small, such as 3 or 6, not {depth}"
    with pytest.raises(UsageError, match=message):
        create_model("small", 10, depth=depth)
