"""How many examples fine-tuning saves: train on a few examples per class, from random and from pretrained weights.

    python -m cnn_jax.train --config cpu --workdir runs/pretrained
    python scripts/transfer.py --init-from runs/pretrained --dataset digits --examples 1 3 10 30 100 --seeds 5
    python scripts/transfer.py --dataset fashion_mnist --examples 1 3 10 30 100 --seeds 5
    python scripts/transfer.py --dataset folder:photos --examples 40 --seeds 5 --model-depth 6 --epochs 6

Without ``--init-from``, a network is first trained on the first half of the dataset's classes, with the recipe ``cpu``
as changed by flags of the training command, and the few examples are of the other half.

Both train the network of the pretrained run for the same number of steps, with the same recipe; a seed determines the
examples too. The output is a Markdown table of the accuracy on all test images: mean and standard deviation.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from speedrun import parse_known, read_recipe, spread

from cnn_jax import cli
from cnn_jax.config import Config, DataConfig
from cnn_jax.data import Dataset, Split, load
from cnn_jax.errors import UsageError

EPOCHS = 10
"""Epochs of each training, in each of which the examples are repeated for ``STEPS`` steps."""

STEPS = 20
"""Steps of an epoch."""

BATCH_SIZE = 50
"""Examples of a step."""

KEPT = ("model", "model_depth", "model_width", "model_dropout", "normalize", "precision")
"""The settings that both trainings have in common with that of the pretrained network."""

NOT_FOLLOWED = frozenset({"init_from", "freeze", "validation_fraction", "patience", "seed", "deterministic"})
"""Settings for which there is no place."""


def main(args: Sequence[str]) -> int:
    """Compare, after pretraining a network if none is given."""
    flags, recipe = parse_arguments(args)
    cli.use_every_processor()
    logging.getLogger("cnn_jax").setLevel(logging.WARNING)
    dataset = load(recipe)
    if flags.init_from is not None:
        check_examples(flags.examples, dataset)
        compare(flags, flags.init_from, dataset)
        return 0
    half = len(dataset.class_names) // 2
    if half < 2:
        raise UsageError(f"{dataset.name} has too few classes to divide them: use 4 or more, or --init-from")
    others = with_classes(dataset, range(half, len(dataset.class_names)))
    check_examples(flags.examples, others)
    with tempfile.TemporaryDirectory() as directory:
        pretrain(recipe, with_classes(dataset, range(half)), Path(directory) / "run")
        compare(flags, Path(directory) / "run", others)
    return 0


def check_examples(numbers: Sequence[int], dataset: Dataset) -> None:
    """Raise UsageError for numbers of examples per class that a class does not have, or an epoch no place for."""
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    most = min(int(counts.min()), STEPS * BATCH_SIZE // len(counts))
    if not all(1 <= number <= most for number in numbers):
        raise UsageError(f"--examples must be from 1 to {most} for {dataset.name}")


def pretrain(recipe: Config, dataset: Dataset, workdir: Path) -> None:
    """Train with a recipe."""
    from cnn_jax.runs.fit import fit

    run = fit(recipe, workdir, dataset=dataset, report=False)
    print(f"{', '.join(run.class_names)}: {run.history[-1]}", file=sys.stderr)


def with_classes(dataset: Dataset, labels: range) -> Dataset:
    """The examples of consecutive classes, counted from 0."""

    def of_classes(split: Split) -> Split:
        chosen = split.subset(np.isin(split.labels, labels))
        return dataclasses.replace(chosen, labels=chosen.labels - np.int32(labels.start))

    splits = {name: of_classes(split) for name, split in dataset.splits.items()}
    return dataclasses.replace(dataset, class_names=dataset.class_names[labels.start : labels.stop], **splits)


def compare(flags: argparse.Namespace, init_from: Path, dataset: Dataset) -> None:
    """Train with all numbers of examples and print the table."""
    from cnn_jax.runs.run import load_config

    pretrained = load_config(init_from)
    config = Config(
        dataset=flags.dataset,
        **{name: getattr(pretrained, name) for name in KEPT},
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        optimizer="adamw",
        learning_rate=0.003,
        schedule="cosine",
        warmup="1 epoch",
        weight_decay=0.01,
        shift=2,
    )
    weights = {"from random weights": None, "from pretrained weights": str(init_from)}
    print(f"| examples per class | {' | '.join(weights)} |\n| --- | --- | --- |")
    for number in flags.examples:
        cells = []
        for init_from in weights.values():
            trained = dataclasses.replace(config, init_from=init_from)
            accuracies = tuple(accuracy(trained, dataset, number, seed) for seed in range(flags.seeds))
            cells.append(spread(accuracies, 3))
        print(f"| {number} | {' | '.join(cells)} |", flush=True)


def accuracy(config: Config, dataset: Dataset, number: int, seed: int) -> float:
    """The test accuracy after training on a number of examples per class."""
    from cnn_jax.runs.fit import fit

    few = dataclasses.replace(dataset, train=choose(dataset.train, number, STEPS * BATCH_SIZE, seed))
    config = dataclasses.replace(config, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        return fit(config, Path(directory) / "run", dataset=few, report=False).history[-1].test_accuracy


def choose(split: Split, number: int, size: int, seed: int) -> Split:
    """A number of examples of each class, at random, repeated up to a size."""
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(split.labels == label) for label in np.unique(split.labels)]
    chosen = np.concatenate([rng.permutation(members)[:number] for members in classes])
    return split.subset(np.resize(chosen, size))


def parse_arguments(args: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Parse the command line; return the flags of this script, and the recipe for the pretrained network."""
    parser = argparse.ArgumentParser(
        description="Compare training from random and from pretrained weights. Other flags are those of python -m "
        "cnn_jax.train: how the data is read, and without --init-from how the first network is trained.",
        allow_abbrev=False,
    )
    parser.add_argument("--init-from", type=Path, help="run directory with the pretrained network")
    parser.add_argument("--dataset", default="digits", help="dataset to train on (default: %(default)s)")
    parser.add_argument("--examples", type=int, nargs="+", default=[1, 3, 10, 30], help="examples per class")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")
    flags, settings = parse_known(parser, args)
    if flags.seeds < 1:
        raise UsageError("--seeds must be at least 1")
    words = ["--dataset", flags.dataset, *settings]
    if flags.init_from is None:
        return flags, read_recipe(["--config", "cpu", *words], NOT_FOLLOWED)
    of_training = vars(Config()).keys() - vars(DataConfig()).keys()
    return flags, read_recipe(words, NOT_FOLLOWED | of_training)


if __name__ == "__main__":
    sys.exit(cli.run(main))
