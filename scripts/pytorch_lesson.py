"""The lesson in PyTorch: the reference for the tests and benchmarks of cnn_jax.

    python scripts/pytorch_lesson.py --epochs 10 --seeds 0 1 2 3 4

This prints one line per epoch for each seed (``seconds`` is the training time, excluding evaluation), and at the end
the mean and sample standard deviation over the seeds of the test accuracy after the last epoch.
"""

import argparse
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
except ModuleNotFoundError:
    sys.exit("error: PyTorch is not installed: pip install -e '.[torch]'")

from cnn_jax.config import Config
from cnn_jax.data import load
from cnn_jax.data.dataset import Split
from cnn_jax.errors import CnnJaxError

BATCH_SIZE = 100
LEARNING_RATE = 0.01


class Network(nn.Module):
    """The lesson's network for 28x28 images of one channel in ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=6, kernel_size=5)
        self.conv2 = nn.Conv2d(in_channels=6, out_channels=12, kernel_size=5)
        self.fc1 = nn.Linear(in_features=12 * 4 * 4, out_features=120)
        self.fc2 = nn.Linear(in_features=120, out_features=60)
        self.out = nn.Linear(in_features=60, out_features=10)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Float images ``[N, 1, 28, 28]`` to logits ``[N, 10]``."""
        t = F.relu(self.conv1(t))
        t = F.max_pool2d(t, kernel_size=2, stride=2)
        t = F.relu(self.conv2(t))
        t = F.max_pool2d(t, kernel_size=2, stride=2)
        t = t.reshape(-1, 12 * 4 * 4)
        t = F.relu(self.fc1(t))
        t = F.relu(self.fc2(t))
        return self.out(t)


def get_num_correct(preds: torch.Tensor, labels: torch.Tensor) -> int:
    """The number of examples whose largest logit ``[N, classes]`` is that of their label ``[N]``."""
    return preds.argmax(dim=1).eq(labels).sum().item()


def train_epoch(network: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """The lesson's loop.

    Returns:
        The number of examples correctly classified, each before its batch's update, and the sum of the batches' mean
        losses.
    """
    total_loss = 0
    total_correct = 0
    for batch in loader:
        images, labels = batch
        preds = network(images)
        loss = F.cross_entropy(preds, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss += loss.item()
        total_correct += get_num_correct(preds, labels)
    return total_correct, total_loss


@torch.no_grad()
def evaluate(network: nn.Module, loader: DataLoader) -> float:
    """The fraction of the loader's examples that the network classifies correctly."""
    correct = sum(get_num_correct(network(images), labels) for images, labels in loader)
    return correct / len(loader.dataset)


def make_loader(split: Split, shuffle: bool = False, device: str = "cpu") -> DataLoader:
    """Batches of float32 images ``[100, C, H, W]`` in [0, 1] and int64 labels ``[100]``, in device memory."""
    images = torch.from_numpy(split.images).to(device).permute(0, 3, 1, 2).contiguous() / 255
    labels = torch.from_numpy(split.labels).to(device).long()
    return DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE, shuffle=shuffle)


def train(train_loader: DataLoader, test_loader: DataLoader, epochs: int, seed: int) -> float:
    """Train a network, printing one line per epoch; return its test accuracy after the last epoch."""
    torch.manual_seed(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        start = time.perf_counter()
        total_correct, total_loss = train_epoch(network, train_loader, optimizer)
        seconds = time.perf_counter() - start
        test_accuracy = evaluate(network, test_loader)
        print(
            f"epoch: {epoch} total_correct: {total_correct} loss: {total_loss:.2f}"
            f" test_accuracy: {test_accuracy:.4f} seconds: {seconds:.2f}",
            flush=True,
        )
    return test_accuracy


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train the lesson's PyTorch network on Fashion-MNIST.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--shuffle", action="store_true", help="shuffle in every epoch, unlike the lesson")
    parser.add_argument("--data-dir", help="directory of Fashion-MNIST (default: $CNN_JAX_DATA_DIR)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of PyTorch threads")
    return parser.parse_args()


def main() -> None:
    """Train a network for each seed and print the mean and standard deviation of the test accuracies."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    try:
        config = Config(dataset="fashion_mnist", data_dir=arguments.data_dir, epochs=arguments.epochs)
        dataset = load(config)
    except CnnJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    train_loader = make_loader(dataset.train, arguments.shuffle)
    test_loader = make_loader(dataset.test)
    accuracies = []
    for seed in arguments.seeds:
        print(f"seed: {seed}")
        accuracies.append(train(train_loader, test_loader, config.epochs, seed))
    spread = f"{statistics.stdev(accuracies):.4f}" if len(accuracies) > 1 else "none"
    print(f"seeds: {len(accuracies)} test_accuracy: {statistics.mean(accuracies):.4f} std: {spread}")


if __name__ == "__main__":
    main()
