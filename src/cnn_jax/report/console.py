"""What a person watching the terminal sees."""

import os
import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import ChunkReport


class EpochPrinter:
    """Prints a line an epoch on standard output and, where standard error is a terminal, draws a bar there.

    A context manager: leaving it takes the bar away.
    """

    def __init__(self, epochs: int):
        self._epochs = epochs
        self._bar: Progress | None = None
        self._console = Console(stderr=True)

    def chunk(self, report: ChunkReport) -> None:
        """Show how far the epoch has come."""
        if not self._console.is_terminal:
            return
        if self._bar is None:
            # Gone when the epoch is done; and standard output stays as it is, for it may be no terminal.
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", epoch=report.epoch + 1, epochs=self._epochs, figures="")
            self._bar.start()
        if report.steps_done:
            metrics = report.metrics
            figures = (
                f"loss {float(metrics.loss) / report.steps_done:.4f} "
                f"accuracy {int(metrics.num_correct) / int(metrics.num_examples):.4f}"
            )
            self._bar.update(self._task, completed=report.steps_done, total=report.steps, figures=figures)

    def epoch(self, record: EpochRecord) -> None:
        """Print the epoch's line."""
        self._remove_bar()
        try:
            print(record, flush=True)
        except BrokenPipeError:  # whoever read the lines has enough of them: training goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._remove_bar()

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
