"""Write the reference values from PyTorch that tests/test_pytorch_agreement.py compares cnn_jax with.

    CNN_JAX_DATA_DIR=DIR python scripts/generate_reference.py

``DIR`` contains Fashion-MNIST. The file is an ``.npz`` of arrays. Parameters have PyTorch's names and layouts, for
example ``initial/conv1.weight``:

- ``torch_version``;
- ``images`` uint8 ``[batches, N, 1, 28, 28]``, ``labels`` int64 ``[batches, N]``: step ``t``, counted from 0,
  uses batch ``t % batches``;
- ``initial/*``: the parameters before the first step;
- ``logits`` float32 ``[N, 10]``, ``gradient/*``: logits and gradients of the first step;
- ``losses`` float32 ``[20]``: the loss of each step, before its update;
- ``displacement/*`` float64 ``[20]``: the Euclidean distance of the parameter from ``initial/*`` after
  each step;
- ``step1/*``, ``step2/*``, ``step20/*``: the parameters after that many steps;
- ``lesson_losses`` float32 ``[120]``: the losses of the lesson itself from the same initial parameters, on the first
  120 batches of 100 images of Fashion-MNIST.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pytorch_lesson import LEARNING_RATE, Network, make_loader
from torch import nn

from cnn_jax.config import Config
from cnn_jax.data import load

PATH = Path(__file__).parents[1] / "tests" / "reference" / "pytorch_lesson.npz"
BATCHES = 5
BATCH_SIZE = 16
STEPS = 20
STORED_STEPS = (1, 2, STEPS)

LESSON_STEPS = 120
SEED = 0

Arrays = dict[str, np.ndarray]


def make_batches() -> tuple[np.ndarray, np.ndarray]:
    """Create images with a coarse pattern per class plus noise, and their labels.

    With the patterns, the loss falls. The noise prevents ties in max pooling, for which the subgradient is not unique
    and implementations differ.

    Returns:
        Images and labels with the shapes and dtypes in the file.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (BATCHES, BATCH_SIZE))
    patterns = np.kron(rng.integers(0, 2, (10, 1, 4, 4)), np.full((7, 7), 192))
    noise = rng.integers(0, 64, (BATCHES, BATCH_SIZE, 1, 28, 28))
    return (patterns[labels] + noise).astype(np.uint8), labels


def train(
    network: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[np.ndarray, float]]:
    """Train, yielding the logits and loss of each step after its update, while its gradients are still stored."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for images, labels in batches:
        logits = network(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield logits.detach().numpy(), loss.item()


def parameters(network: nn.Module) -> Arrays:
    """Copies of the parameters, by name."""
    return {name: parameter.detach().numpy().copy() for name, parameter in network.named_parameters()}


def gradients(network: nn.Module) -> Arrays:
    """Copies of the parameters' gradients, by name."""
    return {name: parameter.grad.numpy().copy() for name, parameter in network.named_parameters()}


def distances(here: Arrays, there: Arrays) -> Arrays:
    """The Euclidean distance between two values of each parameter, by name."""
    return {name: np.linalg.norm(np.float64(here[name]) - there[name]) for name in here}


def under(prefix: str, arrays: Arrays) -> Arrays:
    """Prefix the names of arrays with ``prefix/``."""
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def make_network() -> Network:
    """The network with its initial parameters."""
    torch.manual_seed(SEED)
    return Network()


def make_reference(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Compute the content of the file, except ``lesson_losses``."""
    network = make_network()
    initial = parameters(network)
    reference = {"torch_version": np.array(torch.__version__), "images": images, "labels": labels}
    reference |= under("initial", initial)
    batches = list(zip(torch.from_numpy(images) / 255, torch.from_numpy(labels), strict=True))
    losses, displacements = [], []
    for step, (logits, loss) in enumerate(train(network, itertools.islice(itertools.cycle(batches), STEPS)), start=1):
        losses.append(loss)
        displacements.append(distances(parameters(network), initial))
        if step == 1:
            reference |= {"logits": logits} | under("gradient", gradients(network))
        if step in STORED_STEPS:
            reference |= under(f"step{step}", parameters(network))
    reference["losses"] = np.float32(losses)
    reference |= under("displacement", {name: np.array([d[name] for d in displacements]) for name in initial})
    return reference


def lesson_losses() -> np.ndarray:
    """The losses of the lesson's first steps."""
    batches = make_loader(load(Config(dataset="fashion_mnist")).train)
    return np.float32([loss for _, loss in train(make_network(), itertools.islice(batches, LESSON_STEPS))])


def main() -> None:
    """Write the file."""
    # A single thread sums in a fixed order, so that the file is reproducible.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    reference = make_reference(*make_batches()) | {"lesson_losses": lesson_losses()}
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **reference)
    print(f"{PATH}: {PATH.stat().st_size} bytes, PyTorch {torch.__version__}")


if __name__ == "__main__":
    main()
