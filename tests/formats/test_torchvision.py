"""torchvision's ResNets load what is exported, and give the same logits; and the other way round."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load

from cnn_jax.formats import pytorch
from cnn_jax.formats.weights import IMAGENET, open_weights
from cnn_jax.models import create_model
from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.task import Task

SHAPE = (45, 64, 3)
EVERY_RESNET = pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50"])


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


@pytest.fixture
def published(torchvision):
    """Makes a network of torchvision with random weights and statistics."""
    torch = pytest.importorskip("torch")

    def make(model, num_classes):
        torch.manual_seed(0)
        network = torchvision.models.get_model(model, weights=None, num_classes=num_classes).eval()
        with torch.no_grad():
            for name, array in network.state_dict().items():
                match array.ndim, name.rpartition(".")[2]:
                    case 1, "weight" | "running_var":
                        array.uniform_(0.5, 1.5)
                    case 1, "bias" | "running_mean":
                        array.uniform_(-0.3, 0.3)
        return network

    return make


def abstract(model, num_classes):
    """The shapes of the variables of our network."""
    return jax.eval_shape(create_model(model, num_classes).init, jax.random.key(0), np.zeros((1, *SHAPE), np.float32))


def torch_logits(network, images, preprocess):
    torch = pytest.importorskip("torch")
    inputs = (images / 255 - np.array(preprocess.mean)) / np.array(preprocess.std)
    with torch.no_grad():
        return network(torch.from_numpy(inputs.astype(np.float32)).permute(0, 3, 1, 2)).numpy()


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@EVERY_RESNET
@pytest.mark.parametrize("is_zip", [False, True], ids=["legacy", "zip"])
def test_published_weights_are_read_to_the_bit(published, path, model, is_zip):
    torch = pytest.importorskip("torch")
    theirs = published(model, 1000).state_dict()
    torch.save(theirs, path, _use_new_zipfile_serialization=is_zip)
    weights = open_weights(path)
    assert weights.preprocess == IMAGENET
    variables = weights.variables(model, abstract(model, 1000), SHAPE)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, abstract(model, 1000))
    np.testing.assert_array_equal(
        variables["params"]["layer2"]["0"]["conv1"]["kernel"], theirs["layer2.0.conv1.weight"].permute(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(
        variables["batch_stats"]["layer2"]["0"]["downsample"]["1"]["var"], theirs["layer2.0.downsample.1.running_var"]
    )
    np.testing.assert_array_equal(variables["params"]["fc"]["kernel"], theirs["fc.weight"].T)


def test_they_give_torchvisions_logits(published, images, path):
    torch, model = pytest.importorskip("torch"), "resnet18"  # tests/models has the others
    network = published(model, 5)
    torch.save(network.state_dict(), path)
    weights = open_weights(path)
    variables = weights.variables(model, abstract(model, 5), SHAPE)
    task = Task(create_model(model, 5), Optimizer(), preprocess=weights.preprocess)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(task.logits)(variables, images))
    assert_close(ours, torch_logits(network, images, IMAGENET))


@EVERY_RESNET
def test_torchvision_loads_what_is_exported_and_gives_the_verified_logits(
    torchvision, make_run, network_of, images, model
):
    torch = pytest.importorskip("torch")
    run = make_run(SHAPE, num_classes=5, model=model)
    state_dict = load(pytorch.to_bytes(network_of(run)))
    network = torchvision.models.get_model(model, weights=None, num_classes=5).eval()
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    network.load_state_dict(tensors, strict=True)
    assert all(array == 0 for name, array in network.state_dict().items() if name.endswith("num_batches_tracked"))
    inputs = (images / np.float32(255) - np.float32(run.task.preprocess.mean)) / np.float32(run.task.preprocess.std)
    ours = np.stack([pytorch.forward_resnet(state_dict, image.transpose(2, 0, 1)) for image in inputs])
    assert_close(ours, torch_logits(network, images, run.task.preprocess))


def test_our_own_files_keep_their_normalization(make_run, network_of, path):
    run = make_run(SHAPE, num_classes=5, model="resnet18")
    path.write_bytes(pytorch.to_bytes(network_of(run)))
    assert open_weights(path).preprocess == run.task.preprocess != IMAGENET


@pytest.mark.parametrize(
    ("name", "shape"), [("conv1.weight", (64, 1, 7, 7)), ("conv1.weight", ()), ("stem.weight", (64, 3, 7, 7))]
)
def test_of_other_networks_the_normalization_is_not_known(published, path, name, shape):
    torch = pytest.importorskip("torch")
    state_dict = published("resnet18", 5).state_dict()
    del state_dict["conv1.weight"]
    torch.save({**state_dict, name: torch.zeros(shape)}, path)
    assert open_weights(path).preprocess is None
