"""The run directory: all files of a run except those in its checkpoints."""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cnn_jax import files
from cnn_jax.config import MAX_LENGTH, Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.checkpoint import holds_only_a_start
from cnn_jax.training.history import EpochRecord

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = ".lock"
NAMES = (
    CONFIG,
    METRICS,
    LOCK,
    "summary.json",
    "ended.json",
    "curves.png",
    "confusion.png",
    "report.html",
    "checkpoints",
    "tensorboard",
)
"""The names of the files and directories in a run directory, except exported networks."""

logger = logging.getLogger("cnn_jax")


class LockedError(UsageError):
    """Another process is training in a run directory."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run directory."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The checkpoint directory."""
        return self.path / "checkpoints"

    @property
    def holds_run(self) -> bool:
        """Whether the directory contains a run: its settings, or checkpoints, which include the settings."""
        return (self.path / CONFIG).exists() or self.checkpoints.exists()

    def check_holds_run(self) -> None:
        """Raise UsageError unless the directory contains a run."""
        if (self.path / "sweep.json").exists():
            raise UsageError(f"{self.path} is the directory of a sweep: choose a run directory in its members")
        if not self.holds_run:
            raise UsageError(f"{self.path} is not a run directory: choose one that training created")

    @property
    def is_started(self) -> bool:
        """Whether ``metrics.jsonl`` exists, which is written after the first checkpoint."""
        return (self.path / METRICS).exists()

    def check_unused(self) -> None:
        """Raise UsageError if the path exists, unless a run was interrupted there before its first checkpoint."""
        if self.holds_run and not self._is_cut_short():
            raise UsageError(f"{self.path} contains a run: continue it with --resume, or choose another --workdir")
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
        """Whether a run was interrupted here before its first checkpoint was written."""
        try:
            self.config()
        except (FileNotFoundError, UsageError):
            return False
        return (self.path / LOCK).exists() and not self.is_started and holds_only_a_start(self.checkpoints)

    def create(self) -> None:
        """Create the directory if it does not exist.

        Raises:
            UsageError: it cannot be created or written, or it contains symbolic links.
        """
        self._check_local()
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
                f"{links[0]} is a symbolic link, which is not allowed in a run directory: remove it, or replace it "
                "with its target"
            )

    def _check_local(self) -> None:
        """Raise UsageError if the path is a URL, or cannot be encoded as UTF-8, as TensorStore needs."""
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(self.path)):
            raise UsageError(f"{self.path} is a URL: choose a local directory, for example a mounted one, as --workdir")
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{self.path.absolute()} cannot be encoded as UTF-8: choose another --workdir, or set a UTF-8 locale"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock that only one training process can have, and remove the temporary files of killed processes.

        The operating system releases the lock when the process ends, even if it is killed.

        Raises:
            LockedError: another process holds the lock.
        """
        with files.open_regular(self.path / LOCK) as file:  # read-only, so that the disk can be remounted read-only
            try:
                self._lock(file)
                files.remove_temporaries(self.path)
            except BlockingIOError:
                raise LockedError(
                    f"another process is training in {self.path}: wait for it, or choose another --workdir"
                ) from None
            except OSError as error:
                logger.warning(
                    "cannot lock %s (%s): make sure that no other process trains in it", self.path, error.strerror
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
            # NFS requires a file opened for writing.
            with files.open_regular(self.path / LOCK, os.O_RDWR) as writable:
                os.dup2(writable.fileno(), file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def config(self) -> Config:
        """Read the settings from ``config.yaml``.

        Raises:
            FileNotFoundError: the file does not exist.
            UsageError: the file cannot be read, or does not contain valid settings.
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
        """Write the settings to ``config.yaml``."""
        self._write(CONFIG, config.to_yaml())

    def write_history(self, history: Sequence[EpochRecord]) -> None:
        """Write ``metrics.jsonl``, one JSON object per line and epoch, replacing the file if it exists."""
        self._write(METRICS, "".join(record.json_line for record in history))

    def append_history(self, record: EpochRecord) -> None:
        """Append an epoch to ``metrics.jsonl``."""
        with self._reporting(METRICS) as path, files.open_regular(path, os.O_RDWR | os.O_APPEND) as file:
            file.write(record.json_line.encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """Yield a temporary file that atomically replaces the named file when the context is left without an error.

        Raises:
            CnnJaxError: the file cannot be written.
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
