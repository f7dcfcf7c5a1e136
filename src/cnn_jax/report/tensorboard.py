"""The figures of every epoch as TensorBoard reads them."""

import contextlib
import importlib.util
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.training.history import EpochRecord

FILE_VERSION = "brain.Event:2"
"""What every event file says first."""


def check_installed() -> None:
    """Raise UsageError where the package that writes event files is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UsageError("tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]'")


class EventFiles:
    """Loss and accuracy by epoch in two event files, ``train`` and ``test``, which TensorBoard draws in one chart.

    They hold each epoch once, however often a run was cut short: opening them puts them in the place of those that are
    there and writes the epochs so far anew. An epoch is dated by the seconds of training.

    A context manager: leaving it closes the files.

    Args:
        directory: of the two files, each in a directory of its own.
        history: the epochs so far.
        steps_per_epoch: over which a training loss is averaged.

    Raises:
        CnnJaxError: they cannot be written; ``append`` raises it too.
    """

    def __init__(self, directory: Path, history: Sequence[EpochRecord], steps_per_epoch: int):
        from tensorboardX import RecordWriter

        self._directory = directory
        self._steps_per_epoch = steps_per_epoch
        self._date = time.time() - sum(record.seconds for record in history)
        self._files: dict[str, RecordWriter] = {}
        with self._reporting():
            for name in ("train", "test"):
                (directory / name).mkdir(parents=True, exist_ok=True)
                for old in (directory / name).glob("events.out.tfevents.*"):
                    old.unlink()
                path = directory / name / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
                self._files[name] = RecordWriter(str(path))
                self._write(name, file_version=FILE_VERSION)
        for record in history:
            self.append(record)

    def append(self, record: EpochRecord) -> None:
        """Add an epoch."""
        self._date += record.seconds
        figures = {
            "train": {"loss": record.loss / self._steps_per_epoch, "accuracy": record.train_accuracy},
            "test": {"loss": record.test_loss, "accuracy": record.test_accuracy},
        }
        with self._reporting():
            for name, values in figures.items():
                for tag, value in values.items():
                    self._write(name, step=record.epoch, summary={"value": [{"tag": tag, "simple_value": value}]})
                self._files[name].flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what could not be written has been reported
                file.close()

    def _write(self, name: str, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._files[name].write(Event(wall_time=self._date, **event).SerializeToString())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CnnJaxError(
                f"cannot write {self._directory} ({error.strerror}): mend that, and go on with --resume"
            ) from None
