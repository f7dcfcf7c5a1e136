"""Metrics as TensorBoard event files."""

import contextlib
import importlib.util
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.report.tables import metrics_by_split
from cnn_jax.training.history import EpochRecord

if TYPE_CHECKING:
    from tensorboardX import RecordWriter

FILE_VERSION = "brain.Event:2"
"""The content of the first record of every event file."""


def check_installed() -> None:
    """Raise UsageError if the package that writes event files is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UsageError("tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]'")


class EventFiles:
    """Event files of loss and accuracy by epoch, one per split, which TensorBoard overlays in one chart.

    Opening them replaces those of an interrupted run and writes the previous epochs again, so that each epoch occurs
    once. The time of an epoch is measured in seconds of training.

    A context manager: leaving it closes the files.

    Args:
        directory: where to write the files, each in a subdirectory named after its split.
        history: the previous epochs.
        steps_per_epoch: the number of steps to average the training loss over.

    Raises:
        CnnJaxError: the files cannot be written; ``append`` raises it too.
    """

    def __init__(self, directory: Path, history: Sequence[EpochRecord], steps_per_epoch: int):
        self._directory = directory
        self._steps_per_epoch = steps_per_epoch
        self._time = time.time() - sum(record.seconds for record in history)
        self._files: dict[str, RecordWriter] = {}
        with self._reporting():
            (directory / "train").mkdir(parents=True, exist_ok=True)
            for folder in directory.iterdir():
                if not folder.is_symlink():
                    for old in folder.glob("events.out.tfevents.*"):
                        old.unlink()
        for record in history:
            self.append(record)

    def append(self, record: EpochRecord) -> None:
        """Add an epoch."""
        self._time += record.seconds
        with self._reporting():
            for split, metrics in metrics_by_split(record, self._steps_per_epoch).items():
                if split not in self._files:
                    self._files[split] = self._open(split)
                    self._write(split, file_version=FILE_VERSION)
                for tag, value in metrics.items():
                    self._write(split, step=record.epoch, summary={"value": [{"tag": tag, "simple_value": value}]})
                self._files[split].flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # write errors have already been reported
                file.close()

    def _open(self, split: str) -> "RecordWriter":
        from tensorboardX import RecordWriter

        path = self._directory / split / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        path.parent.mkdir(exist_ok=True)
        return RecordWriter(str(path))

    def _write(self, split: str, **event: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._files[split].write(Event(wall_time=self._time, **event).SerializeToString())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CnnJaxError(
                f"cannot write {self._directory} ({error.strerror}): fix this, then rerun with --resume"
            ) from None
