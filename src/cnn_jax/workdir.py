"""The run directory: what a run leaves on disk besides its checkpoints."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from cnn_jax.config import Config
from cnn_jax.errors import UsageError
from cnn_jax.training.loop import EpochRecord


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run directory, by its path."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints."""
        return self.path / "checkpoints"

    def check_unused(self) -> None:
        """Raise UsageError where there is anything already at the path."""
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise UsageError(
                f"{self.path} exists already: choose another --workdir, or go on with the run in it by --resume"
            )

    def create(self, config: Config) -> None:
        """Make the directory, where it is not there yet, and write the settings down.

        Raises:
            UsageError: the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("config.yaml", config.to_yaml())
        except OSError as error:
            raise UsageError(
                f"cannot write the run directory {self.path} ({error.strerror}): choose another --workdir"
            ) from None

    def config(self) -> Config:
        """The settings of the run.

        Raises:
            UsageError: there is no run at the path.
        """
        if not (self.path / "config.yaml").is_file():
            raise UsageError(f"{self.path} is not a run directory: it has no config.yaml; name one that training made")
        return Config.from_yaml(self.path / "config.yaml")

    def write_history(self, history: Sequence[EpochRecord]) -> None:
        """Write ``metrics.jsonl`` anew: a JSON object for each epoch."""
        self._write("metrics.jsonl", "".join(_json_line(record) for record in history))

    def append_history(self, record: EpochRecord) -> None:
        """Add an epoch to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json_line(record))

    def write_summary(self, config: Config, history: Sequence[EpochRecord], compile_seconds: float) -> None:
        """Write ``summary.json``: the outcome, what it took, and on what."""
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
            "device_count": jax.device_count(),
            "versions": {
                "python": platform.python_version(),
                **{package: metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")},
            },
        }
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        # Replaced as a whole: a crash leaves the old file or the new one, never half of one.
        unfinished = self.path / f"{name}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path / name)


def _json_line(record: EpochRecord) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"
