"""Benchmark an epoch of the lesson in cnn_jax and in PyTorch, alternating in one process.

    python scripts/benchmark.py --epochs 5 --torch-compile --json benchmark.json

Both train the lesson's network in float32 on the same batches of 100 in the same order, using Adam with a learning rate
of 0.01. PyTorch runs the lesson's own loop over a DataLoader of tensors in memory (on the GPU if there is one); cnn_jax
runs the loop of its command. They alternate after every epoch, so that changes of the machine's speed affect both. Each
is warmed up before the first epoch; the column "compile" shows the time this took.

The output is a Markdown table with the median and range of the seconds per epoch, the speedup over PyTorch (the median
ratio of paired epochs), and the test accuracy. Without Fashion-MNIST, both train on noise of the same shape.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split, load
from cnn_jax.errors import CnnJaxError


class CnnJax:
    """cnn_jax, with the training loop of its command."""

    name = "cnn_jax"

    def __init__(self, config: Config, dataset: Dataset):
        from cnn_jax.training.loop import Trainer

        self._trainer = Trainer(config, dataset)

    def warm_up(self) -> None:
        """Compile, and create the initial state."""
        self._trainer.compile()
        self._epochs = self._trainer.epochs(self._trainer.start())

    def train_epoch(self) -> float:
        """Train one epoch and return its seconds."""
        self._record, _ = next(self._epochs)
        return self._record.seconds

    def test_accuracy(self) -> float:
        """The fraction of the test examples correctly classified."""
        return self._record.test_accuracy


class PyTorch:
    """PyTorch, with the lesson's own training loop."""

    def __init__(self, config: Config, dataset: Dataset, compiled: bool):
        import pytorch_lesson
        import torch

        self.name = "PyTorch, torch.compile" if compiled else "PyTorch, the lesson's loop"
        self._lesson = pytorch_lesson
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        torch.manual_seed(config.seed)
        self._network = pytorch_lesson.Network().to(device)
        self._callable = torch.compile(self._network) if compiled else self._network
        self._train_loader = pytorch_lesson.make_loader(dataset.train, device=device)
        self._test_loader = pytorch_lesson.make_loader(dataset.test, device=device)
        self._make_optimizer = lambda: torch.optim.Adam(self._network.parameters(), lr=config.learning_rate)
        self._optimizer = self._make_optimizer()

    def warm_up(self) -> None:
        """Train on ten batches, then restore the initial state."""
        state = {name: value.clone() for name, value in self._network.state_dict().items()}
        self._lesson.train_epoch(self._callable, list(islice(self._train_loader, 10)), self._optimizer)
        self._synchronize()
        self._network.load_state_dict(state)
        self._optimizer = self._make_optimizer()

    def train_epoch(self) -> float:
        """Train one epoch and return its seconds."""
        began = time.perf_counter()
        self._lesson.train_epoch(self._callable, self._train_loader, self._optimizer)
        self._synchronize()
        return time.perf_counter() - began

    def test_accuracy(self) -> float:
        """The fraction of the test examples correctly classified."""
        return self._lesson.evaluate(self._network, self._test_loader)


def main() -> None:
    """Run the benchmark and print the table."""
    flags = parse_arguments()
    if flags.threads:
        # Before jax and torch are imported: both start as many threads as they have processors.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    cli.use_every_processor()
    config = dataclasses.replace(Config.from_yaml("tutorial"), epochs=flags.epochs, data_dir=flags.data_dir)
    dataset = load_or_make(config)
    contenders = [PyTorch(config, dataset, compiled=False), CnnJax(config, dataset)]
    if flags.torch_compile:
        contenders.append(PyTorch(config, dataset, compiled=True))

    warm_ups = {contender.name: timed(contender.warm_up) for contender in contenders}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for epoch in range(flags.epochs):
        for contender in contenders:
            seconds[contender.name].append(contender.train_epoch())
            print(f"epoch: {epoch} {contender.name}: {seconds[contender.name][-1]:.3f} s", file=sys.stderr, flush=True)

    baseline = seconds[contenders[0].name]
    rows = [
        {
            "name": contender.name,
            "compile_seconds": warm_ups[contender.name],
            "epoch_seconds": seconds[contender.name],
            "median_epoch_seconds": statistics.median(seconds[contender.name]),
            "times_faster": statistics.median(
                theirs / ours for theirs, ours in zip(baseline, seconds[contender.name], strict=True)
            ),
            "test_accuracy": contender.test_accuracy(),
        }
        for contender in contenders
    ]
    result = {"data": dataset.name, "epochs": flags.epochs, **machine(), "rows": rows}
    print_table(result)
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time an epoch of the lesson in cnn_jax and in PyTorch.")
    parser.add_argument("--epochs", type=int, default=5, help="number of epochs (default: %(default)s)")
    parser.add_argument("--torch-compile", action="store_true", help="also benchmark torch.compile")
    parser.add_argument("--threads", type=int, help="number of processors to use (default: all)")
    parser.add_argument("--data-dir", help="directory of Fashion-MNIST (default: $CNN_JAX_DATA_DIR)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def load_or_make(config: Config) -> Dataset:
    """Load Fashion-MNIST, or create noise of the same shape if it cannot be loaded."""
    try:
        return load(config)
    except CnnJaxError as error:
        print(f"{error}\ntraining on noise of the same shape", file=sys.stderr)
    rng = np.random.default_rng(0)
    train, test = (
        Split(rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.int32))
        for count in (60_000, 10_000)
    )
    return Dataset("noise of Fashion-MNIST's shape", train, test, tuple("0123456789"))


def timed(function: Callable[[], None]) -> float:
    """Call a function and return the seconds it took."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def machine() -> dict[str, object]:
    """The hardware and the versions of the software that is installed."""
    import jax

    def installed(package: str) -> bool:
        return importlib.util.find_spec(package) is not None

    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch") if installed(name)},
    }


def print_table(result: dict) -> None:
    """Print the results as a Markdown table."""
    versions = ", ".join(f"{package} {result[package]}" for package in ("python", "jax", "flax", "torch"))
    hardware = f"{result['processors']} processors, {result['device']}"
    print(f"{result['data']}, {result['epochs']} epochs; {hardware}; {versions}\n")
    print("| | compile, s | epoch, s: median (range) | times faster | test accuracy |")
    print("| --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        seconds = f"{row['median_epoch_seconds']:.2f} ({min(row['epoch_seconds']):.2f}-{max(row['epoch_seconds']):.2f})"
        cells = (row["name"], f"{row['compile_seconds']:.1f}", seconds, f"{row['times_faster']:.1f}")
        print(f"| {' | '.join(cells)} | {row['test_accuracy']:.4f} |")


if __name__ == "__main__":
    main()
