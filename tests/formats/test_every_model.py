"""Weights of every architecture, with its batch statistics."""

import jax
import numpy as np
import pytest
from safetensors import safe_open

from cnn_jax import data
from cnn_jax.data import Dataset, Split
from cnn_jax.errors import UsageError
from cnn_jax.formats import pytorch, safetensors, verify
from cnn_jax.formats.safetensors import encode
from cnn_jax.formats.state_dict import flatten, flattened_layers
from cnn_jax.formats.weights import open_weights
from cnn_jax.models import MODELS

SHAPE = (24, 37, 3)
EVERY_MODEL = pytest.mark.parametrize("model", sorted(MODELS.keys() - {"resnet34", "resnet50"}))  # too large
UNPUBLISHED = sorted(MODELS.keys() - {"cnn", "resnet18", "resnet34", "resnet50"})


@pytest.fixture
def network_like(make_run, network_of):
    return lambda model: network_of(make_run(SHAPE, num_classes=4, model=model))


def read(path, network):
    return open_weights(path).variables(network.model, network.variables, SHAPE)


@EVERY_MODEL
def test_weights_and_statistics_are_exported_to_the_bit(network_like, path, model):
    network = network_like(model)
    path.write_bytes(safetensors.to_bytes(network))
    variables = read(path, network)
    assert variables.keys() == network.variables.keys()
    jax.tree.map(np.testing.assert_array_equal, variables, network.variables)
    assert open_weights(path).preprocess == network.task.preprocess


@EVERY_MODEL
def test_they_are_read_to_the_bit_by_pytorchs_names(network_like, in_pytorch, path, model):
    network = network_like(model)
    state_dict = in_pytorch(network)
    kinds = {name.rpartition(".")[2] for name in state_dict}
    assert kinds <= {"weight", "bias", "running_mean", "running_var"}
    path.write_bytes(encode(state_dict, {"format": "pt"}))
    jax.tree.map(np.testing.assert_array_equal, read(path, network), network.variables)


@EVERY_MODEL
def test_the_input_of_a_linear_layer_is_features_or_flattened_feature_maps(network_like, model):
    """Else the order of its inputs would be another one in PyTorch."""
    kernels = {name: array.shape for name, array in flatten(network_like(model).variables).items() if "kernel" in name}
    features = {shape[-1] for shape in kernels.values()}
    if model == "small":  # flattens in PyTorch's order: tests/test_recipe_agreement.py
        features = {64 * (SHAPE[0] // 8) * (SHAPE[1] // 8)}
    flattened = flattened_layers(model, SHAPE)
    for name, shape in kernels.items():
        if len(shape) == 2:
            layer = name.removesuffix(".kernel")
            expected = {np.prod(flattened[layer])} if layer in flattened else features
            assert shape[0] in expected, f"add the layer {layer} of {model} to flattened_layers, or correct it there"


def test_the_names_are_those_of_layers_and_collections(network_like, path):
    network = network_like("resnet18")
    path.write_bytes(safetensors.to_bytes(network))
    with safe_open(path, framework="np") as file:
        names = set(file.keys())
    norms = {f"bn1.{name}" for name in ("scale", "bias", "mean", "var")}
    assert names >= {"conv1.kernel", "layer2.0.downsample.0.kernel", "layer2.0.downsample.1.mean", "fc.bias"} | norms


@pytest.mark.parametrize("model", UNPUBLISHED)
def test_without_a_pytorch_module_there_is_no_such_format(network_like, model):
    expected = rf"there is no PyTorch module for the network {model}, only for cnn, .*: use --format safetensors"
    with pytest.raises(UsageError, match=expected):
        verify.format_module("pytorch", model)
    with pytest.raises(UsageError, match=expected):
        pytorch.to_bytes(network_like(model))


@pytest.mark.parametrize("form", [safetensors, pytorch])
@pytest.mark.parametrize("number", [-1e-9, np.nan])
def test_a_variance_that_is_none_is_refused(network_like, in_pytorch, path, form, number, check_message):
    network = network_like("resnet18")
    arrays = flatten(network.variables) if form is safetensors else in_pytorch(network)
    (name,) = (name for name in arrays if name.startswith("layer1.0.bn2.") and name.endswith("var"))
    arrays = {**arrays, name: arrays[name].copy()}
    arrays[name][3] = number
    path.write_bytes(encode(arrays, {}))
    with pytest.raises(UsageError, match=rf"{name} in .* contains (negative numbers|infinity or NaN): set") as error:
        read(path, network)
    check_message(str(error.value))


def test_missing_statistics_are_told(network_like, path):
    network = network_like("resnet18")
    path.write_bytes(encode(flatten({"params": network.params}), {}))
    with pytest.raises(UsageError, match=r"bn1\.mean \[64\] is missing, .*, and 36 more; set --init-from to weights"):
        read(path, network)


def test_other_architectures_are_told(network_like, path):
    network = network_like("cnn")
    path.write_bytes(safetensors.to_bytes(network))
    with pytest.raises(UsageError, match="are for the network cnn: use --model cnn"):
        read(path, network_like("resnet18"))
    path.write_bytes(safetensors.encode(flatten(network.variables), {}))
    with pytest.raises(UsageError, match=r"do not match this network for 24x37x3 images: bn1\.bias \[64\] is missing"):
        read(path, network_like("resnet18"))


@EVERY_MODEL
def test_what_is_exported_is_the_same_on_all_platforms(network_like, model):
    """Converters do not know what depends on the platform."""
    network = network_like(model)
    assert "platform" not in str(jax.make_jaxpr(network.probabilities)(np.zeros((1, *SHAPE), np.uint8)))


@pytest.mark.parametrize("form", ["stablehlo", "onnx", "safetensors"])
def test_a_network_with_statistics_is_exported(make_run, network_of, path, form):
    if form == "onnx":
        for package in ("jax2onnx", "onnx", "onnxruntime"):
            pytest.importorskip(package)
    network = network_of(make_run((16, 16, 3), model="resnet9"))
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    module = verify.format_module(form, "resnet9")
    path.write_bytes(module.to_bytes(network))
    expected = network.probabilities(images)
    assert expected.max() < 0.99
    np.testing.assert_allclose(module.load(path, network)(images), expected, atol=1e-5)


@pytest.mark.parametrize("image_shape", [(16, 16, 3)], indirect=True)
def test_a_resnet_is_exported_for_pytorch(image_shape, make_run, images, path, monkeypatch):
    run = make_run(image_shape, model="resnet18")
    split = Split(images[:3], np.zeros(3, np.int32))
    monkeypatch.setattr(data, "load", lambda config: Dataset(config.dataset, split, split, run.class_names))
    assert run.export(path, "pytorch").largest_difference < 1e-5
    assert run.predict(images[:3]).max() < 0.99
