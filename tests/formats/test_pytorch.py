"""Weights for PyTorch: against the values in tests/reference, and against PyTorch where it is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from cnn_jax.errors import CnnJaxError
from cnn_jax.formats import pytorch
from cnn_jax.formats.safetensors import encode
from cnn_jax.formats.state_dict import flattened_layers, from_state_dict, to_state_dict
from cnn_jax.formats.weights import open_weights
from cnn_jax.models import create_model
from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.task import Task

ROOT = Path(__file__).parents[2]
LESSON = (28, 28, 1)
FLATTENED = flattened_layers("cnn", LESSON)


@pytest.fixture(scope="module")
def reference():
    with np.load(ROOT / "tests" / "reference" / "pytorch_lesson.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def initial(reference):
    """The weights of the lesson's network before training, as PyTorch has them."""
    return {name.removeprefix("initial/"): array for name, array in reference.items() if name.startswith("initial/")}


def relative_error(actual, expected):
    return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


def logits_of(params, num_classes, images):
    with jax.default_matmul_precision("highest"):
        return np.asarray(Task(create_model("cnn", num_classes), Optimizer()).logits({"params": params}, images))


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_from_pytorch_and_back_changes_no_bit(initial):
    assert_same(to_state_dict(from_state_dict(initial, FLATTENED), FLATTENED), initial)


def test_the_forward_pass_that_verifies_is_pytorchs(reference, initial):
    logits = [pytorch.forward_cnn(initial, image / 255) for image in reference["images"][0]]
    assert relative_error(np.stack(logits), reference["logits"]) < 1e-5


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 0), (2, 3)])
def test_the_convolution_is_pytorchs(monkeypatch, stride, padding):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    image, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 9, 12), (4, 3, 2, 5)))
    theirs = torch.nn.functional.conv2d(*map(torch.from_numpy, (image[None], weight)), stride=stride, padding=padding)
    for memory in (1, 500, 1 << 22):  # one row at a time, several, all
        monkeypatch.setattr(pytorch, "MAX_WINDOWS", memory)
        ours = pytorch.convolve(image, weight, stride, padding)
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-5, atol=1e-5)


def test_weights_from_pytorch_give_its_logits(reference, initial, tmp_path):
    path = tmp_path / "pytorch.safetensors"
    path.write_bytes(encode(initial, {"format": "pt"}))
    like = jax.eval_shape(create_model("cnn", 10).init, jax.random.key(0), np.zeros((1, *LESSON), np.float32))
    params = open_weights(path).variables("cnn", like, LESSON)["params"]
    logits = logits_of(params, 10, reference["images"][0].transpose(0, 2, 3, 1))
    assert relative_error(logits, reference["logits"]) < 1e-5


def test_the_file_tells_what_it_is(network, tmp_path):
    path = tmp_path / "pytorch.safetensors"
    path.write_bytes(pytorch.to_bytes(network))
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, no mapping
    assert metadata.keys() == {"format", "model", "tta", "image_shape", "mean", "std", "class_names"}
    assert metadata["format"] == "pt"  # by which Hugging Face's libraries know PyTorch's
    assert json.loads(metadata["class_names"]) == list(network.class_names)
    assert shapes["conv1.weight"] == [6, network.image_shape[2], 5, 5]
    assert shapes["conv2.weight"] == [12, 6, 5, 5]
    assert shapes["out.weight"] == [3, 60]
    assert shapes["out.bias"] == [3]


@pytest.mark.usefixtures("known_data")
@pytest.mark.parametrize("image_shape", [(21, 30, 3)], indirect=True)
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        pytest.param("conv1.weight", lambda weight: weight[:, :, ::-1, ::-1], id="kernel flipped"),
        pytest.param("conv2.weight", lambda weight: weight.transpose(0, 1, 3, 2), id="height and width swapped"),
        pytest.param(
            "fc1.weight",
            lambda weight: weight.reshape(120, 12, -1).transpose(0, 2, 1).reshape(120, -1),
            id="flattened in the order H, W, C",
        ),
    ],
)
def test_a_mistaken_conversion_is_not_kept(run, tmp_path, monkeypatch, name, mistake):
    def mistaken(arrays, flattened):
        state_dict = to_state_dict(arrays, flattened)
        return {**state_dict, name: mistake(state_dict[name])}

    monkeypatch.setattr(pytorch, "to_state_dict", mistaken)
    with pytest.raises(CnnJaxError, match="was not written: its probabilities differ from the network's by"):
        run.export(tmp_path / "pytorch.safetensors", "pytorch")
    assert list(tmp_path.iterdir()) == []


def torch_logits(torch, state_dict, images):
    """The lesson's forward pass by PyTorch's own functions, for images of any size."""
    f = torch.nn.functional
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    for layer in ("conv1", "conv2"):
        x = f.max_pool2d(f.relu(f.conv2d(x, state_dict[f"{layer}.weight"], state_dict[f"{layer}.bias"])), 2, 2)
    x = x.flatten(1)
    for layer in ("fc1", "fc2"):
        x = f.relu(f.linear(x, state_dict[f"{layer}.weight"], state_dict[f"{layer}.bias"]))
    return f.linear(x, state_dict["out.weight"], state_dict["out.bias"]).numpy()


def test_pytorch_gives_the_same_logits(network, images):
    torch = pytest.importorskip("torch")
    state_dict = {name: torch.from_numpy(array) for name, array in load(pytorch.to_bytes(network)).items()}
    assert relative_error(torch_logits(torch, state_dict, images), logits_of(network.params, 3, images)) < 1e-5


def test_the_lessons_network_loads_the_file(make_run, network_of, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    run = make_run(LESSON, num_classes=10)
    (tmp_path / "file").write_bytes(pytorch.to_bytes(network_of(run)))
    spec = importlib.util.spec_from_file_location("pytorch_lesson", ROOT / "scripts" / "pytorch_lesson.py")
    sys.modules["pytorch_lesson"] = lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    network = lesson.Network()
    network.load_state_dict(load_file(tmp_path / "file"))
    images = np.random.default_rng(0).integers(0, 256, (50, *LESSON), dtype=np.uint8)
    with torch.no_grad():
        theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).numpy()
    assert relative_error(theirs, logits_of(run.state.params, 10, images)) < 1e-5
