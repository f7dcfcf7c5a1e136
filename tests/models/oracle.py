"""What the tests of networks share: the same network in PyTorch, with the same weights."""

import contextlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.training.optimizer import Optimizer
from cnn_jax.training.step import Batch, loss_fn
from cnn_jax.training.task import Task

COLLECTIONS = {
    # what PyTorch calls it, for arrays of one dimension and of more: the collection, our name
    ("weight", False): ("params", "scale"),
    ("weight", True): ("params", "kernel"),
    ("bias", False): ("params", "bias"),
    ("running_mean", False): ("batch_stats", "mean"),
    ("running_var", False): ("batch_stats", "var"),
}


@contextlib.contextmanager
def float64():
    """In this context, computations of float64 arrays are in float64."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def import_torch():
    return pytest.importorskip("torch")


def import_torchvision():
    """torchvision, also where its compiled operators cannot be loaded, which the networks do without.

    That is so with its package for GPUs and PyTorch's for CPUs.
    """
    torch = import_torch()
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = f"torchvision::{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(signature.partition("(")[0], signature[signature.index("(") :])
        return pytest.importorskip("torchvision")


def randomize(network, seed):
    """Give a PyTorch network random weights, scales, biases and statistics, with activations of about one."""
    torch = import_torch()
    generator = torch.Generator().manual_seed(seed)

    def uniform(array, low, high):
        array.copy_(low + (high - low) * torch.rand(array.shape, generator=generator))

    with torch.no_grad():
        for name, array in network.state_dict().items():  # the arrays themselves
            kind = name.rpartition(".")[2]
            if kind == "weight" and array.ndim > 1:
                bound = (6 / array[0].numel()) ** 0.5
                uniform(array, -bound, bound)
            elif kind == "weight":
                uniform(array, 0.3, 1.0)
            elif kind == "running_var":
                uniform(array, 0.5, 1.5)
            elif kind in ("bias", "running_mean"):
                uniform(array, -0.3, 0.3)


def variables_of(arrays):
    """Our variables from PyTorch's arrays by their names in the state_dict: weights, or their gradients."""
    flat = {}
    for name, array in arrays.items():
        layer, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        array = array.detach().numpy()
        collection, kind = COLLECTIONS[kind, array.ndim > 1]
        if array.ndim > 1:
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        flat[f"{collection}.{layer}.{kind}"] = array.copy()
    return flax.traverse_util.unflatten_dict(flat, sep=".")


def examples(shape, num_classes, seed=0):
    """uint8 images and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, num_classes, shape[0], dtype=np.int32)


def largest_error(ours, theirs):
    """The largest difference of two trees, relative to the largest number of each array."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-3), ours, theirs)
    return max(jax.tree.leaves(errors))


def inference_error(model, network, images):
    """The largest difference between the logits of a model and of PyTorch's network in evaluation, in float32."""
    torch = import_torch()
    network.eval()
    with torch.no_grad():
        theirs = network(torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(255))).numpy()
    ours = jax.jit(Task(model, Optimizer()).logits)(variables_of(network.state_dict()), images)
    assert 0.1 < np.abs(theirs).max() < 100
    return np.abs(ours - theirs).max()


def scale(images):
    """``SCALE`` in float64."""
    return images.astype(jnp.float64) / 255


def training_errors(model, network, images, labels):
    """The largest relative errors of loss, gradients and running statistics after a forward and a backward pass.

    In float64: in float32, one of a million numbers that a ReLU or a pool
    compares falls on the other side, after which gradients differ by a hundredth, as they do between PyTorch's float32
    and its float64.
    """
    torch = import_torch()
    network.double().train()
    variables = variables_of(network.state_dict())
    model_state = {"batch_stats": variables["batch_stats"]}
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=2)
    task = Task(model, Optimizer(), preprocess=scale)
    with float64():
        batch = Batch.of(images, labels)
        result = step(variables["params"], model_state, task, batch, jax.random.key(0))
    (loss, (_, new)), gradients = jax.device_get(result)
    logits = network(torch.tensor(images.transpose(0, 3, 1, 2) / 255))
    their_loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())
    their_loss.backward()
    their_gradients = variables_of({name: weight.grad for name, weight in network.named_parameters()})["params"]
    their_stats = variables_of(network.state_dict())["batch_stats"]
    assert largest_error(variables["batch_stats"], their_stats) > 0.01  # the step changed them
    return [
        largest_error(float(loss), their_loss.item()),
        largest_error(gradients, their_gradients),
        largest_error(new["batch_stats"], their_stats),
    ]


def flat_shapes(model, image_shape):
    """The shapes of a model's parameters and statistics, by their names joined by dots."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flat = flax.traverse_util.flatten_dict(dict(variables), sep=".")
    return {name.partition(".")[2]: array.shape for name, array in flat.items()}


def num_parameters(model, image_shape):
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return sum(array.size for array in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), image)["params"]))
