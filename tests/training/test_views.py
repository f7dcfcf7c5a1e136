"""Views of images, compared with numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.training.views import views


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("channels", [1, 3])
def test_views(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, channels), np.uint8)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    crops = [images, padded[:, :6, :5], padded[:, 2:, 2:]]
    expected = np.stack([view for crop in crops for view in (crop, np.flip(crop, 2))])
    for tta, weights in {"none": (1,), "flip": (0.5, 0.5), "multicrop": (0.25, 0.25, *[0.125] * 4)}.items():
        result, result_weights = views(images, tta)
        np.testing.assert_array_equal(result, expected[: len(weights)])
        assert result.dtype == np.uint8
        assert result_weights == weights


@pytest.mark.parametrize(("tta", "message"), [("flop", "unknown tta 'flop'"), ("multicrop", "tta multicrop needs")])
def test_impossible_views(tta, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(partial(views, tta=tta), jax.ShapeDtypeStruct((1, 1, 4, 1), jnp.uint8))
