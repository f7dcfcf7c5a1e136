"""The metadata of a checkpoint: everything but the state, as JSON."""

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import Progress, create_task
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.task import Normalize, Task

FORMAT = 8
"""The version of the format of checkpoints."""

_METRICS = {"loss": float, "num_correct": int, "num_examples": int, "first_nonfinite_step": int}


@dataclass(frozen=True)
class RunMetadata:
    """The metadata of a run at one of its checkpoints.

    Attributes:
        config: the settings, with the dataset's resolved name.
        device_count: number of devices it was trained on.
        process_count: number of processes that they belonged to.
        image_shape: ``(H, W, C)`` of the images.
        class_names: one name per logit.
        data_sha256: the checksum of the dataset.
        steps_per_epoch: number of batches in an epoch.
        preprocess: the conversion of images to the network's input.
        class_weights: factor of the loss of each class, or None.
        dark_background: whether nearly all training images are light on a dark background.
        history: a record for each finished epoch.
        epoch_seconds: training time of the epoch in progress.
        epoch_input_wait_seconds: the part of it in which the devices waited for images.
        epoch_metrics: metrics of the epoch in progress.
    """

    config: Config
    device_count: int
    process_count: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    data_sha256: str
    steps_per_epoch: int
    preprocess: Normalize
    class_weights: tuple[float, ...] | None
    dark_background: bool
    history: tuple[EpochRecord, ...] = ()
    epoch_seconds: float = 0.0
    epoch_input_wait_seconds: float = 0.0
    epoch_metrics: Metrics = dataclasses.field(default_factory=Metrics.zero)

    @property
    def hardware(self) -> str:
        """The number of devices, and of processes if there are several, in words."""
        return f"{self.device_count} device(s)" + f" of {self.process_count} processes" * (self.process_count > 1)

    def at(self, history: list[EpochRecord], progress: Progress) -> Self:
        """The metadata of the same run at another point of its training."""
        return dataclasses.replace(
            self,
            history=tuple(history),
            epoch_seconds=progress.seconds,
            epoch_input_wait_seconds=progress.input_wait_seconds,
            epoch_metrics=progress.metrics,
        )

    def create_task(self) -> Task:
        """Create the task that the run was trained on."""
        return create_task(
            self.config,
            len(self.class_names),
            self.preprocess,
            steps_per_epoch=self.steps_per_epoch,
            class_weights=self.class_weights,
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON, including the version of the format."""
        return {
            "format": FORMAT,
            **vars(self),
            "config": dataclasses.asdict(self.config),
            "preprocess": dataclasses.asdict(self.preprocess),
            # As text, which takes milliseconds for thousands of epochs: every checkpoint contains all before it.
            "history": "".join(record.json_line for record in self.history),
            "epoch_metrics": self.epoch_metrics.to_numbers(),
        }

    @classmethod
    def from_json(cls, values: Any, workdir: Path) -> Self:
        """Convert from the result of ``to_json``.

        Args:
            values: JSON from a checkpoint, which is not trusted.
            workdir: the run directory, for error messages.

        Raises:
            CnnJaxError: another version of the format, or invalid values.
        """
        try:
            if values["format"] != FORMAT:
                raise CnnJaxError(
                    f"{workdir} has checkpoints of format {reprlib.repr(values['format'])}, and this version of "
                    f"cnn_jax reads format {FORMAT}: use the version that wrote them"
                )
            return cls(
                config=Config.from_mapping(values["config"], "config"),
                device_count=_checked(values["device_count"], int),
                process_count=_checked(values["process_count"], int),
                image_shape=_image_shape(values["image_shape"]),
                class_names=tuple(_checked(name, str) for name in _checked(values["class_names"], list)),
                data_sha256=_checked(values["data_sha256"], str),
                steps_per_epoch=_checked(values["steps_per_epoch"], int),
                preprocess=_preprocess(values["preprocess"], values["image_shape"][-1]),
                class_weights=_class_weights(values["class_weights"], len(values["class_names"])),
                dark_background=_checked(values["dark_background"], bool),
                history=tuple(map(_record, _checked(values["history"], str).splitlines())),
                epoch_seconds=_checked(values["epoch_seconds"], float),
                epoch_input_wait_seconds=_checked(values["epoch_input_wait_seconds"], float),
                epoch_metrics=_metrics(values["epoch_metrics"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UsageError) as error:
            raise CnnJaxError(
                f"the checkpoints in {workdir} were not written by this package "
                f"({reprlib.repr(str(error))}): start a new run"
            ) from None


def _checked(value: Any, kind: type) -> Any:
    """Return the value if it has the type and, if it is a number, fits into 32 bits as on the device."""
    if type(value) is not kind:
        raise TypeError(f"{reprlib.repr(value)} is not of type {kind.__name__}")
    if (kind is int and not 0 <= value < 2**31) or (
        kind is float and float(np.finfo(np.float32).max) < abs(value) < math.inf
    ):
        raise ValueError(f"{reprlib.repr(value)} is out of range")
    return value


def _image_shape(value: Any) -> tuple[int, int, int]:
    height, width, channels = (_checked(size, int) for size in _checked(value, list))
    return height, width, channels


def _preprocess(value: Any, channels: int) -> Normalize:
    mean, std = (tuple(_checked(number, float) for number in _checked(value[name], list)) for name in ("mean", "std"))
    if {len(mean), len(std)} not in ({1}, {channels}) or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise ValueError(f"{reprlib.repr(value)} is not a mean and a standard deviation for each channel")
    return Normalize(mean, std)


def _class_weights(value: Any, num_classes: int) -> tuple[float, ...] | None:
    if value is None:
        return None
    weights = tuple(_checked(number, float) for number in _checked(value, list))
    if len(weights) != num_classes or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"{reprlib.repr(value)} is not a weight for each class")
    return weights


def _record(line: str) -> EpochRecord:
    kinds = {field.name: int if field.type is int else float for field in dataclasses.fields(EpochRecord)}
    return EpochRecord.from_json({name: _checked(number, kinds[name]) for name, number in json.loads(line).items()})


def _metrics(value: Any) -> Metrics:
    return Metrics.from_numbers({name: _checked(value[name], kind) for name, kind in _METRICS.items()})
