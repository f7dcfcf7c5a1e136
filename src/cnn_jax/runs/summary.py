"""The content of ``summary.json``: results, sizes, times, hardware and software versions."""

import datetime
import json
import logging
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import jax
import msgspec

from cnn_jax import files
from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.processors import cpu_model, num_processors
from cnn_jax.report.tables import best_epoch
from cnn_jax.training.evaluation import Score
from cnn_jax.training.history import EpochRecord

NAME = "summary.json"
MAX_LENGTH = 100_000
"""The maximum size of the file in bytes."""

Text = Annotated[str, msgspec.Meta(max_length=200)]

logger = logging.getLogger("cnn_jax")


class Summary(msgspec.Struct, frozen=True):
    """What is in ``summary.json`` only, and the results with the step that they are of."""

    test_accuracy: float
    test_loss: float
    steps: int
    compile_seconds: float
    backend: Text
    device: Text
    device_count: int
    versions: dict[Text, Text]


def read_summary(workdir: Path) -> Summary | None:
    """Read ``summary.json``; None if training is not finished, or with a warning if the file is not valid."""
    path = workdir / NAME
    try:
        return msgspec.convert(json.loads(files.read_bytes(path, MAX_LENGTH)), Summary)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, msgspec.ValidationError) as error:
        logger.warning("%s is ignored, because it cannot be read (%s)", path, getattr(error, "strerror", None) or error)
        return None


def summarize(
    config: Config,
    history: Sequence[EpochRecord],
    dataset: Dataset,
    *,
    num_parameters: int,
    test_score: Score,
    compile_seconds: float,
    devices: Sequence[jax.Device],
) -> dict[str, Any]:
    """Summarize a run that has just finished.

    Args:
        config: the settings.
        history: at least one epoch.
        dataset: the data that the network was trained and tested on.
        num_parameters: the size of the network.
        test_score: the score of the final parameters on the test split.
        compile_seconds: the time that compilation took.
        devices: the devices it was trained on, all of the same kind.

    Returns:
        Values that can be converted to JSON.
    """
    last, best = history[-1], best_epoch(history)
    validation = {
        name: value for name, value in last.to_json().items() if name in ("validation_accuracy", "validation_loss")
    }
    return {
        "test_accuracy": test_score.accuracy,
        "test_loss": test_score.loss,
        **validation,
        "best_epoch": best.epoch,
        "best_accuracy": best.selection_accuracy,
        "epochs": len(history),
        "steps": last.step,
        "train_seconds": sum(record.seconds for record in history),
        "input_wait_seconds": sum(record.input_wait_seconds for record in history),
        "compile_seconds": compile_seconds,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "dataset": config.dataset,
        "image_shape": list(dataset.image_shape),
        "examples": {name: len(split) for name, split in dataset.splits.items()},
        "num_parameters": num_parameters,
        "backend": devices[0].platform,
        "device": cpu_model() if devices[0].platform == "cpu" else devices[0].device_kind,
        "device_count": len(devices),
        "process_count": len({device.process_index for device in devices}),
        "cpu_count": num_processors(),
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")},
        },
    }
