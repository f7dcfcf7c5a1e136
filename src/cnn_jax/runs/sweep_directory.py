"""The directory of a sweep: its settings, a run directory for each member, and the results."""

import contextlib
import fcntl
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cnn_jax import files
from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.report import sweep as report
from cnn_jax.report.sweep import Result
from cnn_jax.runs.grid import Grid
from cnn_jax.runs.space import Space
from cnn_jax.runs.workdir import Workdir

FIGURES = {"test_accuracy", "test_loss", "epochs", "train_seconds"}
"""What is read from the summary of every member."""

MAX_BYTES = 1 << 20
"""The maximum size of a file with the settings or the result of a member."""


@dataclass(frozen=True)
class SweepDirectory:
    """The directory of a sweep.

    Attributes:
        path: the directory; ``sweep.json`` in it has the settings, and ``members`` the run directories.
    """

    path: Path

    def create(self, plan: Grid | Space) -> None:
        """Create it, with the settings of a new sweep.

        Raises:
            UsageError: it exists, or cannot be created.
        """
        try:
            if self.path.exists() and any(self.path.iterdir()):
                problem = "contains a sweep: continue it with --resume, or" if self._file.exists() else "is not empty:"
                raise UsageError(f"{self.path} {problem} choose another --workdir")
            (self.path / "members").mkdir(parents=True, exist_ok=True)
            with files.replacing(self._file) as path:
                path.write_text(json.dumps(plan.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {self.path} ({error.strerror}): choose another --workdir") from None

    def plan(self) -> Grid | Space:
        """The settings of the sweep: those of a search are a space.

        Raises:
            UsageError: it is not the directory of a sweep, or its settings are damaged.
        """
        try:
            values = json.loads(files.read_bytes(self._file, MAX_BYTES))
        except FileNotFoundError:
            raise UsageError(f"{self.path} is not the directory of a sweep: choose one that sweep created") from None
        except OSError as error:
            raise UsageError(f"cannot read {self._file}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{self._file} is damaged: start a new sweep") from None
        kind = Space if isinstance(values, dict) and "trials" in values else Grid
        return kind.from_json(values, str(self._file))

    @property
    def resume_command(self) -> str:
        """How to continue the sweep on the command line."""
        return f"python -m cnn_jax.sweep --resume --workdir {shlex.quote(str(self.path.absolute()))}"

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Wait until no other process is in this context; without effect on file systems that have no locks."""
        try:
            file = files.open_regular(self.path / ".lock", os.O_RDWR | os.O_CREAT)  # NFS locks only what is writable
        except OSError as error:
            raise UsageError(f"cannot write {self.path} ({error.strerror}): make it writable") from None
        with file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def claimed(self, name: str) -> AbstractContextManager[None]:
        """Hold the claim of a member, which only one process can have, before anything else of it is opened.

        Raises:
            LockedError: another process has it.
            UsageError: it cannot be written.
        """
        claim = Workdir(self.path / "claims" / name)
        claim.create()
        return claim.locked()

    def member(self, name: str) -> Workdir:
        """The run directory of a member."""
        return Workdir(self.path / "members" / name)

    def results(self) -> list[Result]:
        """What became of each member so far; of a search, those that have begun."""
        plan = self.plan()
        members = plan.members() if isinstance(plan, Grid) else dict(self._trials())
        return [self.result(name, config) for name, config in members.items()]

    def _trials(self) -> Iterator[tuple[str, Config]]:
        for path in sorted((self.path / "members").glob("trial-*")):
            with contextlib.suppress(FileNotFoundError):  # stopped before the first checkpoint
                yield path.name, Workdir(path).config()

    def result(self, name: str, config: Config) -> Result:
        """What became of a member so far."""
        path = self.member(name).path
        summary, end = _read(path / "summary.json"), _read(path / "ended.json")
        end = end if isinstance(end, dict) else {}
        summary = summary if isinstance(summary, dict) else {}
        metrics = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        error = str(end["error"]) if "error" in end else None
        return Result(
            name, config, metrics if metrics.keys() >= FIGURES else None, error, is_pruned=end.get("is_pruned") is True
        )

    def end(self, name: str, error: CnnJaxError, *, is_pruned: bool = False) -> None:
        """Record why a member ended before it was finished."""
        with files.replacing(self.member(name).path / "ended.json") as path:
            path.write_text(json.dumps({"error": str(error), "is_pruned": is_pruned}) + "\n", encoding="utf-8")

    def write_results(self, pictures: Mapping[str, Callable[[Path], None]] = MappingProxyType({})) -> None:
        """Write the results of all members as a table (``results.csv``), JSON, a plot and a page.

        Args:
            pictures: functions that write further pictures (PNG), by the names of their files.

        Raises:
            CnnJaxError: a file cannot be written.
        """
        plan, results = self.plan(), self.results()
        table = json.dumps(report.as_json(results, plan.settings), indent=2) + "\n"
        self._replace("results.json", lambda path: path.write_text(table, encoding="utf-8"))
        rows = report.as_csv(results, plan.settings)
        self._replace("results.csv", lambda path: path.write_text(rows, encoding="utf-8"))
        if any(result.summary for result in results):
            self._replace("accuracy.png", lambda path: report.save_plot(path, results, plan.settings))
            for name, write in pictures.items():
                self._replace(name, write)
            shown = {name: (self.path / name).read_bytes() for name in pictures}
            self._replace(
                "report.html", lambda path: report.save_page(path, plan.config, results, plan.settings, shown)
            )

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        try:
            with files.replacing(self.path / name) as path:
                write(path)
        except OSError as error:
            raise CnnJaxError(
                f"cannot write {self.path / name} ({error.strerror}): fix this, then rerun with --resume"
            ) from None

    @property
    def _file(self) -> Path:
        return self.path / "sweep.json"


def _read(path: Path) -> Any:
    """The content of a JSON file, or None if it does not exist or is damaged."""
    try:
        return json.loads(files.read_bytes(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
