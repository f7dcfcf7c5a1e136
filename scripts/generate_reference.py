"""Write the reference values from PyTorch that tests/test_pytorch_agreement.py compares cnn_jax with.

    python scripts/generate_reference.py

The file is an ``.npz`` of arrays. Parameters have PyTorch's names and layouts, for example ``initial/conv1.weight``:

- ``torch_version``;
- ``images`` uint8 ``[batches, N, 1, 28, 28]``, ``labels`` int64 ``[batches, N]``: step ``t``, counted from 0,
  uses batch ``t % batches``;
- ``initial/*``: the parameters before the first step;
- ``logits`` float32 ``[N, 10]``, ``gradient/*``: logits and gradients of the first step;
- ``losses`` float32 ``[20]``: the loss of each step, before its update;
- ``displacement/*`` float64 ``[20]``: the Euclidean distance of the parameter from ``initial/*`` after
  each step;
- ``step1/*``, ``step2/*``, ``step20/*``: the parameters after that many steps.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pytorch_lesson import LEARNING_RATE, Network
from torch import nn

PATH = Path(__file__).parents[1] / "tests" / "reference" / "pytorch_lesson.npz"
BATCHES = 5
BATCH_SIZE = 16
STEPS = 20
STORED_STEPS = (1, 2, STEPS)

# Among the first forty seeds, the one with falling losses that depend least on rounding: see ``sensitivity``.
SEED = 26

# About ten rounding errors, and three times the error of Adam's steps from optax's float32 bias correction.
PARAMETER_PERTURBATION = 1e-6
LEARNING_RATE_PERTURBATION = 2e-5

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
    network: nn.Module, images: np.ndarray, labels: np.ndarray, learning_rate: float = LEARNING_RATE
) -> Iterator[tuple[np.ndarray, float]]:
    """Train, yielding the logits and loss of each step after its update, while its gradients are still stored."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for step in range(STEPS):
        batch = step % BATCHES
        logits = network(torch.from_numpy(images[batch]) / 255)
        loss = F.cross_entropy(logits, torch.from_numpy(labels[batch]))
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


def make_reference(images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Compute the content of the file."""
    torch.manual_seed(SEED)
    network = Network()
    initial = parameters(network)
    reference = {"torch_version": np.array(torch.__version__), "images": images, "labels": labels}
    reference |= under("initial", initial)
    losses, displacements = [], []
    for step, (logits, loss) in enumerate(train(network, images, labels), start=1):
        losses.append(loss)
        displacements.append(distances(parameters(network), initial))
        if step == 1:
            reference |= {"logits": logits} | under("gradient", gradients(network))
        if step in STORED_STEPS:
            reference |= under(f"step{step}", parameters(network))
    reference["losses"] = np.float32(losses)
    reference |= under("displacement", {name: np.array([d[name] for d in displacements]) for name in initial})
    return reference


def sensitivity(reference: Arrays, trials: int = 20) -> tuple[float, float]:
    """Measure how much differences as small as those between two correct implementations grow during training.

    Adam divides each gradient by its magnitude, so that tiny gradients, which are mostly rounding errors, change their
    parameters as much as any; and a small change of a parameter may change the sign of a ReLU's input or the position
    of a maximum. With most seeds this changes the second digit of the losses, and a comparison would only test whether
    both implementations round alike.

    Returns:
        The largest relative change of any loss, and the largest change of any parameter after the last step as a
        fraction of its displacement.
    """
    network = Network()
    loss_changes, parameter_changes = [], []
    for factor in np.linspace(-1, 1, trials):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                initial = torch.from_numpy(reference[f"initial/{name}"])
                parameter.copy_(initial * (1 + PARAMETER_PERTURBATION * torch.randn_like(initial)))
        learning_rate = LEARNING_RATE * (1 + factor * LEARNING_RATE_PERTURBATION)
        steps = train(network, reference["images"], reference["labels"], learning_rate)
        losses = np.array([loss for _, loss in steps])
        loss_changes.append(np.max(np.abs(losses / reference["losses"] - 1)))
        for name, parameter in parameters(network).items():
            change = np.linalg.norm(parameter - reference[f"step{STEPS}/{name}"])
            parameter_changes.append(change / reference[f"displacement/{name}"][-1])
    return max(loss_changes), max(parameter_changes)


def main() -> None:
    """Write the file."""
    # A single thread sums in a fixed order, so that the file is reproducible.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    reference = make_reference(*make_batches())
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **reference)
    print(f"{PATH}: {PATH.stat().st_size} bytes, PyTorch {torch.__version__}")
    loss_change, parameter_change = sensitivity(reference)
    print(f"perturbed: losses change by up to {loss_change:.1e}, displacements by {parameter_change:.1e}")


if __name__ == "__main__":
    main()
