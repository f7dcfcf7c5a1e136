"""Weights for other classes, other channels and with other normalizations than those of the dataset."""

import json
import logging

import jax
import numpy as np
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.formats.safetensors import encode
from cnn_jax.formats.state_dict import flatten
from cnn_jax.formats.weights import open_weights
from cnn_jax.training.task import Normalize

SHAPE = (16, 20, 3)
FORMS = pytest.mark.parametrize("form", ["flax", "pytorch"])


@pytest.fixture(params=["cnn", "resnet18"])
def model(request):
    return request.param


@pytest.fixture
def write(path, make_run, network_of, in_pytorch):
    """Writes weights of the model to the file; returns the network."""

    def write(form, model, shape=SHAPE, num_classes=7, **changes):
        network = network_of(make_run(shape, num_classes=num_classes, seed=1, model=model))
        arrays = in_pytorch(network) if form == "pytorch" else flatten(network.variables)
        path.write_bytes(encode({**arrays, **changes}, {}))
        return network

    return write


@pytest.fixture
def target(make_run, network_of, model):
    return network_of(make_run(SHAPE, num_classes=3, seed=2, model=model)).variables


@FORMS
def test_the_head_is_new_for_other_classes(write, path, model, target, form, caplog):
    caplog.set_level(logging.INFO)
    given = write(form, model)
    variables = open_weights(path).variables(model, target, SHAPE)
    head = {"cnn": "out", "resnet18": "fc"}[model]
    assert caplog.messages == [f"the head {head} is new: the weights are for 7 classes, the dataset has 3"]
    for collection, expected in given.variables.items():
        for layer in expected:
            from_target = (collection, layer) == ("params", head)
            jax.tree.map(
                np.testing.assert_array_equal,
                variables[collection][layer],
                target["params"][head] if from_target else expected[layer],
            )


@FORMS
def test_with_the_same_number_of_classes_it_is_kept(write, path, model, target, form, caplog):
    caplog.set_level(logging.INFO)
    given = write(form, model, num_classes=3)
    variables = open_weights(path).variables(model, target, SHAPE)
    jax.tree.map(np.testing.assert_array_equal, variables, given.variables)
    assert caplog.messages == []


@FORMS
@pytest.mark.parametrize("model", ["cnn"], indirect=True)
@pytest.mark.parametrize("bias", [(), (0,), (8,), (7, 1)])
def test_of_a_head_that_is_none_the_differences_are_told(write, path, target, form, bias, check_message):
    write(form, "cnn", **{"out.bias": np.zeros(bias, np.float32)})
    with pytest.raises(UsageError, match=r"out\.bias has shape .* instead of \[3\].*; set --init-from to") as error:
        open_weights(path).variables("cnn", target, SHAPE)
    check_message(str(error.value))


@FORMS
@pytest.mark.parametrize("model", ["cnn"], indirect=True)
def test_other_differences_are_told_without_the_head(write, path, target, form):
    write(form, "cnn", shape=(21, 30, 3))
    kind = {"flax": r"fc1\.kernel has shape \[96, 120\]", "pytorch": r"fc1\.weight has shape \[120, 96\]"}[form]
    with pytest.raises(UsageError, match=rf"for 16x20x3 images: {kind} instead of \[\d+, \d+\]; set --init-from to"):
        open_weights(path).variables("cnn", target, SHAPE)


@FORMS
@pytest.mark.parametrize(("given", "wanted", "kind"), [(3, 1, "color"), (1, 3, "gray")])
def test_other_channels_are_told(write, path, make_run, network_of, model, form, given, wanted, kind):
    write(form, model, shape=(16, 20, given))
    target = network_of(make_run((16, 20, wanted), num_classes=3, model=model)).variables
    with pytest.raises(
        UsageError,
        match=rf"for 16x20x{wanted} images: conv1.* has shape .* instead of .*; "
        rf"the weights are for {kind} images: use --channels {given}$",
    ):
        open_weights(path).variables(model, target, (16, 20, wanted))


def test_the_normalization_must_be_for_the_channels_of_the_images(path, make_run, network_of):
    network = network_of(make_run((16, 16, 1)))
    numbers = json.dumps([0.5, 0.5, 0.5])
    path.write_bytes(encode(flatten(network.variables), {"mean": numbers, "std": numbers}))
    with pytest.raises(UsageError, match=r"the mean and std in .* are for images of 3 channels, not 1: set --"):
        open_weights(path).variables("cnn", network.variables, (16, 16, 1))


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ("[0.0]", "[1.0]", Normalize()),
        ("[0.5, 0, 1e-3]", "[0.25, 1, 2]", Normalize((0.5, 0.0, 1e-3), (0.25, 1.0, 2.0))),
        ("[0.5]", None, None),
        (None, "[0.5]", None),
        ("[0.5]", "[0.5, 0.5, 0.5]", None),
        ("[0.5, 0.5]", "[0.5, 0.5]", None),
        ("[]", "[]", None),
        ("0.5", "0.5", None),
        ('["0.5"]', "[0.5]", None),
        ("[true]", "[0.5]", None),
        ("[0.5]", "[0]", None),
        ("[0.5]", "[-1]", None),
        ("[0.5]", "[1e-300]", None),
        ("[1e300]", "[1]", None),
        ("[NaN]", "[1]", None),
        ("[0]", "[Infinity]", None),
        (f"[{'9' * 400}]", "[1]", None),
        (f"[{'9' * 5000}]", "[1]", None),
        ("[" * 100_000, "[1]", None),
        ("average", "[1]", None),
    ],
)
def test_a_normalization_in_the_metadata_is_used_if_it_is_one(path, mean, std, expected):
    metadata = {name: text for name, text in {"mean": mean, "std": std}.items() if text is not None}
    path.write_bytes(encode({"out.bias": np.zeros(3, np.float32)}, metadata))
    assert open_weights(path).preprocess == expected
