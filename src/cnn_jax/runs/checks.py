"""Checks of settings and data before training, so that a mistake is one line at the start."""

import dataclasses
import hashlib
import os

import jax
import numpy as np

from cnn_jax.config import DETERMINISTIC_OPS, MAY_CHANGE, Config
from cnn_jax.data import Dataset
from cnn_jax.errors import UsageError, printable
from cnn_jax.report import tensorboard
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.processes import Processes
from cnn_jax.runs.workdir import CONFIG, Workdir
from cnn_jax.training.loop import Progress, create_task


def check_usable(config: Config) -> None:
    """Raise UsageError for an unknown model or settings that contradict each other, or if something is missing.

    That may be an environment variable or a package. The length of the warm-up is checked when the dataset is known.
    """
    create_task(dataclasses.replace(config, schedule="constant", warmup="0 epochs"), num_classes=2)
    if config.freeze == "backbone" and config.init_from is None:
        raise UsageError("--freeze backbone keeps random weights: name trained ones with --init-from")
    if config.deterministic and jax.default_backend() == "gpu" and DETERMINISTIC_OPS not in os.getenv("XLA_FLAGS", ""):
        raise UsageError(f"deterministic on a GPU needs XLA_FLAGS={DETERMINISTIC_OPS}: set it before jax initializes")
    if config.tensorboard:
        tensorboard.check_installed()


def check_dataset(config: Config, dataset: Dataset) -> None:
    """Raise UsageError if the dataset lacks the examples that training needs."""
    if config.patience is not None and "validation" not in dataset.splits:
        raise UsageError("--patience needs a validation set: set --validation-fraction, such as 0.1")
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    if not counts.all():
        name = printable(dataset.class_names[counts.argmin()])
        raise UsageError(f"class {name} of {printable(dataset.name)} has no training images: add some, or remove it")


def check_same(config: Config, trained: Config, directory: Workdir) -> None:
    """Raise UsageError if settings that cannot be changed on resume differ from those that the run was trained with.

    These are the settings in the checkpoint, because ``config.yaml`` may have been edited.
    """
    before, now = dataclasses.asdict(trained), dataclasses.asdict(config)
    may_change = set(MAY_CHANGE)
    if all(config["dataset"].startswith("folder:") for config in (before, now)):
        may_change.add("dataset")  # a folder may have moved: resume compares the images
    if config.schedule != "constant":
        may_change.discard("epochs")  # the learning rate depends on it
    different = [name for name in now if now[name] != before[name] and name not in may_change]
    if different:
        differences = ", ".join(f"{name} was {before[name]} and is now {now[name]}" for name in different)
        if different == ["epochs"]:
            raise UsageError(
                f"the --schedule {config.schedule} of the run in {directory.path} is for its number of epochs: "
                f"{differences}; start a new run"
            )
        raise UsageError(
            f"the run in {directory.path} was trained with other settings: {differences}; use the same settings, also "
            f"in {CONFIG}, or choose another --workdir"
        )


def check_same_in_all(processes: Processes, metadata: RunMetadata, start: Progress | None) -> None:
    """Raise UsageError unless all processes have the same settings, data and, if they are given, initial weights.

    Files may be in other places.
    """
    if processes.count == 1:
        return
    kind, colon, _ = metadata.config.dataset.partition(":")
    dataset = {"dataset": kind + colon} if kind == "folder" else {}
    settings = dataclasses.replace(metadata.config, data_dir=None, init_from=None, **dataset)
    processes.check_same("settings", settings.to_yaml())
    processes.check_same("images or labels", metadata.data_sha256)
    if start is not None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(start.state)]
        processes.check_same("initial weights", hashlib.sha256(b"".join(map(bytes, leaves))).hexdigest())
