"""Progress in the terminal."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnn_jax.report.sweep import Result
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import ChunkReport


class EpochPrinter:
    """Prints one line per epoch to standard output and, if standard error is a terminal, shows a progress bar there.

    A context manager: leaving it removes the bar.
    """

    def __init__(self, epochs: int):
        self._epochs = epochs
        self._bar: Progress | None = None
        self._console = Console(stderr=True)

    def chunk(self, report: ChunkReport) -> None:
        """Show the progress within the epoch."""
        if self._console.is_terminal:
            with contextlib.suppress(OSError):  # the terminal is gone: training continues until the signal is handled
                self._show(report)

    def _show(self, report: ChunkReport) -> None:
        if self._bar is None:
            # Removed at the end of the epoch. Standard output is not redirected: it may not be a terminal.
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", epoch=report.epoch + 1, epochs=self._epochs, metrics="")
            self._bar.start()
        if report.steps_done:
            loss = float(report.metrics.loss) / report.steps_done
            accuracy = int(report.metrics.num_correct) / int(report.metrics.num_examples)
            text = f"loss {loss:.4f} accuracy {accuracy:.4f}"
            self._bar.update(self._task, completed=report.steps_done, total=report.steps, metrics=text)

    def epoch(self, record: EpochRecord) -> None:
        """Print the line of an epoch."""
        self._remove_bar()
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        _print_line(record.line(columns))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._remove_bar()

    def _remove_bar(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None


class SweepPrinter:
    """Prints a line for each network of a sweep and, if standard error is a terminal, shows a progress bar there.

    A context manager: leaving it removes the bar.

    Args:
        results: what became of the networks so far.
        num_members: the number of networks.
        epochs: the maximum number of epochs of one that has not begun.
        as_lines: whether to print lines.
    """

    def __init__(self, results: Sequence[Result], num_members: int, epochs: int, *, as_lines: bool = True):
        self._as_lines = as_lines
        self._total = num_members
        self._done = sum(result.is_done for result in results)
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("network {task.fields[number]}/{task.fields[networks]}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("epochs: {task.completed}/{task.total}"),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        total = sum(result.config.epochs for result in results if not result.is_done)
        total += (num_members - len(results)) * epochs
        self._task = self._bar.add_task("", total=total, number=self._done + 1, networks=self._total)

    def epoch(self, record: EpochRecord) -> None:
        """Show the progress by an epoch."""
        with contextlib.suppress(OSError):  # the terminal is gone
            self._bar.advance(self._task)

    def result(self, result: Result) -> None:
        """Print the line of a network."""
        self._done += 1
        with contextlib.suppress(OSError):
            self._bar.update(self._task, number=min(self._done + 1, self._total))
        if self._as_lines:
            _print_line(f"{self._done}/{self._total} {result.line()}")

    def __enter__(self) -> Self:
        if self._console.is_terminal:  # stopping a bar that is disabled prints a line break before rich 14
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            with contextlib.suppress(OSError):
                self._bar.stop()


def _print_line(line: str) -> None:
    """Print a line on standard output; if nobody reads it any more, training continues."""
    try:
        print(line, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # The reader closed the pipe, or the terminal is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
