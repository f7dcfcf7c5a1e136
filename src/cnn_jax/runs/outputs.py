"""What a run prints and writes besides its checkpoints: the first line, warnings, and the report."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.report import page, plots
from cnn_jax.runs.run import count_parameters
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import Trainer
from cnn_jax.training.sharding import process_indices

MIN_STEPS = 50
"""The number of steps after which a network should have learned something."""

logger = logging.getLogger("cnn_jax")


def first_line(trainer: Trainer, dataset: Dataset, model: str) -> str:
    """What is trained, on what data and devices."""
    counts = " and ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    shape, num_parameters = "x".join(map(str, dataset.image_shape)), count_parameters(trainer.abstract_state.params)
    devices, num_processes = trainer.mesh.devices.flat, len(process_indices(trainer.mesh))
    devices = f"{len(devices)} {devices[0].platform.upper()} device{'s' if len(devices) > 1 else ''}"
    if num_processes > 1:
        devices += f" of {num_processes} processes"
    return (
        f"{dataset.name}: {counts} images of {shape} in {len(dataset.class_names)} classes; {model}: "
        f"{num_parameters:,} parameters; {devices}"
    )


def report_files(
    config: Config,
    history: Sequence[EpochRecord],
    steps_per_epoch: int,
    dataset: Dataset,
    logits: np.ndarray,
    summary: Mapping[str, Any],
) -> dict[str, Callable[[Path], None]]:
    """The functions that write the files of the report, by name; ``logits`` are those of the test examples."""
    labels, predictions = dataset.test.labels, logits.argmax(axis=-1)
    return {
        "curves.png": lambda path: plots.save_curves(path, history, steps_per_epoch),
        "confusion.png": lambda path: plots.save_confusion(path, labels, predictions, dataset.class_names),
        "report.html": lambda path: page.save_page(
            path,
            config=config,
            history=history,
            steps_per_epoch=steps_per_epoch,
            dataset=dataset,
            logits=logits,
            test_loss=summary["test_loss"],
            num_parameters=summary["num_parameters"],
            summary=summary,
        ),
    }


def warn_if_untrained(record: EpochRecord, steps_per_epoch: int, num_classes: int) -> None:
    """Warn if the training loss is that of predicting every class with the same probability, or higher."""
    loss, chance = record.loss / steps_per_epoch, math.log(num_classes)
    if loss > 0.99 * chance:
        logger.warning(
            "the network is not learning: the training loss is %.4f after epoch %d, and %.4f is that of guessing; try "
            "a lower --learning-rate",
            loss,
            record.epoch,
            chance,
        )


def warn_if_constant(logits: np.ndarray, dataset: Dataset) -> None:
    """Warn if the network predicts the same class for all test images, which are of several."""
    predictions = np.unique(logits.argmax(axis=-1))
    if len(predictions) == 1 and len(np.unique(dataset.test.labels)) > 1:
        logger.warning(
            "the network predicts %s for every test image: try a lower --learning-rate",
            dataset.class_names[predictions[0]],
        )
