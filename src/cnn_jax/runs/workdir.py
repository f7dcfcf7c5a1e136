"""The run directory: what a run leaves on disk besides its checkpoints."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import jax

from cnn_jax import files
from cnn_jax.config import MAX_LENGTH, Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.checkpoint import holds_only_a_start
from cnn_jax.training.evaluation import Score
from cnn_jax.training.history import EpochRecord

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = ".lock"
NAMES = (
    CONFIG,
    METRICS,
    LOCK,
    "summary.json",
    "curves.png",
    "confusion.png",
    "report.html",
    "checkpoints",
    "tensorboard",
)
"""All that a run directory holds, besides what was exported to it."""

logger = logging.getLogger("cnn_jax")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run directory, by its path."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def holds_run(self) -> bool:
        """Whether there is a run: its settings, or checkpoints, which hold them too."""
        return (self.path / CONFIG).exists() or self.checkpoints.exists()

    def check_holds_run(self) -> None:
        """Raise UsageError if there is no run."""
        if not self.holds_run:
            raise UsageError(f"{self.path} is not a run directory: name one that training made")

    @property
    def is_started(self) -> bool:
        """Whether the first checkpoint was written, after which comes ``metrics.jsonl``."""
        return (self.path / METRICS).exists()

    def check_unused(self) -> None:
        """Raise UsageError if there is anything at the path, except the remains of a start that was cut short."""
        if self.holds_run and not self._is_cut_short():
            raise UsageError(f"{self.path} holds a run: continue it with --resume, or choose another --workdir")
        if self.holds_run or not self.path.exists():
            return
        try:
            left_over = self.path.is_dir() and all(
                path.name == LOCK or files.is_temporary(path) for path in self.path.iterdir()
            )
        except OSError as error:
            raise UsageError(f"cannot read {self.path} ({error.strerror}): choose another --workdir") from None
        if not left_over:
            raise UsageError(f"{self.path} exists and is not a run directory: choose another --workdir")

    def _is_cut_short(self) -> bool:
        """Whether a training process was killed here before it had written its first checkpoint."""
        try:
            self.config()
        except (FileNotFoundError, UsageError):
            return False
        return (self.path / LOCK).exists() and not self.is_started and holds_only_a_start(self.checkpoints)

    def create(self) -> None:
        """Make the directory, if it does not exist yet.

        Raises:
            UsageError: it cannot be made or written, or something in it is a symbolic link.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            files.open_regular(self.path / LOCK, os.O_RDWR | os.O_CREAT).close()
        except OSError as error:
            raise UsageError(
                f"cannot write the run directory {self.path} ({error.strerror}): choose another --workdir"
            ) from None
        paths = [self.path / name for name in NAMES]
        if not (self.path / "tensorboard").is_symlink():
            paths += (self.path / "tensorboard").glob("*")
        if links := [path for path in paths if path.is_symlink()]:
            raise UsageError(
                f"{links[0]} is a symbolic link, which is not followed in a run directory: remove it, or "
                "put what it points to in its place"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from training in the directory; remove what a killed process left in it.

        The operating system releases the lock when the process ends, in whatever way.

        Raises:
            UsageError: another process holds it.
        """
        with files.open_regular(self.path / LOCK) as file:  # for reading, or the disk could not become read-only
            try:
                self._lock(file)
                files.remove_temporaries(self.path)
            except BlockingIOError:
                raise UsageError(
                    f"another process is training in {self.path}: wait for it, or choose another --workdir"
                ) from None
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): make sure that no other process trains in it", self.path, error.strerror
                )
            yield

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            # NFS locks only what is open for writing.
            with files.open_regular(self.path / LOCK, os.O_RDWR) as writable:
                os.dup2(writable.fileno(), file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def config(self) -> Config:
        """The settings in ``config.yaml``.

        Raises:
            FileNotFoundError: the file does not exist.
            UsageError: it cannot be read, or does not hold valid settings.
        """
        path = self.path / CONFIG
        try:
            return Config.from_yaml_content(files.read_bytes(path, MAX_LENGTH), str(path))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UsageError(
                f"cannot read {path} ({error.strerror}): remove it to use the settings in the checkpoints"
            ) from None
        except UsageError as error:
            raise UsageError(f"{error}; remove the file to use the settings in the checkpoints") from None

    def write_config(self, config: Config) -> None:
        """Write ``config.yaml``: the settings."""
        self._write(CONFIG, config.to_yaml())

    def write_history(self, history: Sequence[EpochRecord]) -> None:
        """Write ``metrics.jsonl`` anew: a JSON object for each epoch."""
        self._write(METRICS, "".join(_json_line(record) for record in history))

    def append_history(self, record: EpochRecord) -> None:
        """Add an epoch to ``metrics.jsonl``."""
        with self._reporting(METRICS) as path, files.open_regular(path, os.O_RDWR | os.O_APPEND) as file:
            file.write(_json_line(record).encode())

    def write_summary(
        self,
        config: Config,
        history: Sequence[EpochRecord],
        test_score: Score,
        compile_seconds: float,
        device_count: int,
    ) -> dict[str, Any]:
        """Write ``summary.json``: the result, the time it took, and the hardware and software; returns its content."""
        last = history[-1]
        validation = {
            name: value for name, value in last.to_json().items() if name in ("validation_accuracy", "validation_loss")
        }
        summary: dict[str, Any] = {
            "test_accuracy": test_score.accuracy,
            "test_loss": test_score.loss,
            **validation,
            "epochs": len(history),
            "steps": last.step,
            "train_seconds": sum(record.seconds for record in history),
            "compile_seconds": compile_seconds,
            "dataset": config.dataset,
            "backend": jax.default_backend(),
            "device_count": device_count,
            "versions": {
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")},
            },
        }
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A temporary file to write, which then takes its place as a whole: a crash leaves the old file or the new.

        Raises:
            CnnJaxError: it cannot be written.
        """
        with self._reporting(name) as path, files.replacing(path) as temporary:
            yield temporary

    def _write(self, name: str, text: str) -> None:
        with self.replacing(name) as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def _reporting(self, name: str) -> Iterator[Path]:
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise CnnJaxError(f"cannot write {path} ({error.strerror}): fix this, then rerun with --resume") from None


def _json_line(record: EpochRecord) -> str:
    return json.dumps(record.to_json()) + "\n"
