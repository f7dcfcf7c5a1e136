"""Residual networks: torchvision's structure, names, results and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    examples,
    flat_shapes,
    import_torchvision,
    inference_error,
    num_parameters,
    randomize,
    training_errors,
)

from cnn_jax.models import create_model

PARAMETERS = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}
EVERY_RESNET = pytest.mark.parametrize("name", PARAMETERS)


@pytest.fixture(scope="module")
def torchvision():
    return import_torchvision()


@EVERY_RESNET
def test_number_of_parameters(name):
    assert num_parameters(create_model(name, 1000), (224, 224, 3)) == PARAMETERS[name]


@EVERY_RESNET
def test_names_and_shapes_are_torchvisions(name, torchvision):
    theirs = {}
    for key, array in torchvision.models.get_model(name, weights=None).state_dict().items():
        layer, _, kind = key.rpartition(".")
        shape = tuple(array.shape)
        if kind == "weight":
            kind = "kernel" if len(shape) > 1 else "scale"
            shape = {4: lambda o, i, h, w: (h, w, i, o), 2: lambda o, i: (i, o), 1: lambda o: (o,)}[len(shape)](*shape)
        if kind != "num_batches_tracked":
            theirs[f"{layer}.{kind.removeprefix('running_')}"] = shape
    assert flat_shapes(create_model(name, 1000), (64, 64, 3)) == theirs


@EVERY_RESNET
def test_logits_are_torchvisions(name, torchvision):
    network = torchvision.models.get_model(name, weights=None, num_classes=5)
    randomize(network, seed=1)
    images, _ = examples((2, 64, 50, 3), 5)
    assert inference_error(create_model(name, 5), network, images) < 1e-4


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet50")]


@pytest.mark.parametrize("name", ["resnet18", *SLOW])
def test_a_training_step_is_torchvisions(name, torchvision):
    network = torchvision.models.get_model(name, weights=None, num_classes=5)
    randomize(network, seed=1)
    # XLA's convolutions, which take less time to compile; test_conv.py compares the band matrix to them.
    assert max(training_errors(create_model(name, 5, portable=True), network, *examples((3, 40, 33, 3), 5))) < 1e-7


def test_initialized_like_torchvision():
    @jax.jit
    def some_params(key):
        params = create_model("resnet18", 3).init(key, jnp.zeros((1, 16, 16, 3)))["params"]
        return (
            params["conv1"]["kernel"],
            params["layer2"]["0"]["downsample"]["0"]["kernel"],
            params["bn1"],
            params["fc"],
        )

    *kernels, norm, head = some_params(jax.random.key(0))
    for kernel in kernels:
        height, width, _, features = kernel.shape
        values = np.asarray(kernel, np.float64)
        # The sample variance of n normal draws has a relative standard deviation of sqrt(2 / n).
        assert values.var() == pytest.approx(2 / (height * width * features), rel=5 * (2 / kernel.size) ** 0.5)
        assert values.mean() == pytest.approx(0, abs=5 * (values.var() / kernel.size) ** 0.5)
        assert np.abs(values).max() > 3 * values.std()  # not truncated
    np.testing.assert_array_equal(norm["scale"], np.ones(64))
    np.testing.assert_array_equal(norm["bias"], np.zeros(64))
    assert 0.9 * 512**-0.5 < np.abs(head["kernel"]).max() <= 512**-0.5
