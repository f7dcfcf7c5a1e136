"""The run directory: what a run leaves on disk besides its checkpoints."""

import dataclasses
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.training.loop import EpochRecord

UNFINISHED = {".lock", ".config.yaml", "checkpoints"}
"""What a run directory holds before its ``config.yaml``, which is written when there is something to go on from."""

logger = logging.getLogger("cnn_jax")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run directory, by its path."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    def check_unused(self) -> None:
        """Raise UsageError where there is anything already at the path but what a start cut short leaves."""
        if not self.path.exists():
            return
        if (self.path / "config.yaml").exists():
            raise UsageError(f"{self.path} holds a run: go on with it by --resume, or choose another --workdir")
        if not self.path.is_dir() or {path.name for path in self.path.iterdir()} - UNFINISHED:
            raise UsageError(f"{self.path} exists and is no run directory: choose another --workdir")

    def create(self) -> None:
        """Make the directory, where it is not there yet.

        Raises:
            UsageError: it cannot be made, or not be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise UsageError(
                f"cannot write the run directory {self.path} ({error.strerror}): choose another --workdir"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from training in the directory.

        The lock is the process's own: it is gone with it, however it ends.

        Raises:
            UsageError: another process has it.
        """
        with (self.path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is training in {self.path}: wait for it, or choose another --workdir"
                ) from None
            except OSError as error:
                logger.warning(
                    "%s cannot be locked (%s): see to it that no other process trains there", self.path, error
                )
            yield

    def config(self) -> Config:
        """The settings of the run.

        Raises:
            UsageError: there is no run at the path.
        """
        if not (self.path / "config.yaml").is_file():
            raise UsageError(f"{self.path} is not a run directory: it has no config.yaml; name one that training made")
        return Config.from_yaml(self.path / "config.yaml")

    def write_config(self, config: Config) -> None:
        """Write ``config.yaml``: the settings."""
        self._write("config.yaml", config.to_yaml())

    def write_history(self, history: Sequence[EpochRecord]) -> None:
        """Write ``metrics.jsonl`` anew: a JSON object for each epoch."""
        self._write("metrics.jsonl", "".join(_json_line(record) for record in history))

    def append_history(self, record: EpochRecord) -> None:
        """Add an epoch to ``metrics.jsonl``."""
        with self._reporting("metrics.jsonl") as path, path.open("r+", encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            file.write(_json_line(record))

    def write_summary(
        self, config: Config, history: Sequence[EpochRecord], compile_seconds: float, device_count: int
    ) -> dict[str, Any]:
        """Write ``summary.json``: the outcome, what it took, and on what; returns what it holds."""
        last = history[-1]
        summary: dict[str, Any] = {
            "test_accuracy": last.test_accuracy,
            "test_loss": last.test_loss,
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
        """A path to write a file to, which then takes its place as a whole: a crash leaves the old one or the new.

        Raises:
            CnnJaxError: it cannot be written.
        """
        with self._reporting(name) as path:
            unfinished = path.with_name(f".{name}")
            yield unfinished
            unfinished.replace(path)

    def _write(self, name: str, text: str) -> None:
        with self.replacing(name) as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def _reporting(self, name: str) -> Iterator[Path]:
        path = self.path / name
        try:
            yield path
        except OSError as error:
            raise CnnJaxError(f"cannot write {path} ({error.strerror}): mend that, and go on with --resume") from None


def _json_line(record: EpochRecord) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"
