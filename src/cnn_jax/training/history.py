"""The training history: one record per epoch."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from cnn_jax.config import Config


@dataclass(frozen=True)
class EpochRecord:
    """The metrics of one epoch; ``str`` gives the line that the command prints.

    After each epoch the validation split is scored, or the test split if there is no validation split. The fields of
    the other one are None.

    Attributes:
        epoch: counted from 0.
        step: steps taken since the start of training.
        total_correct: training examples correctly classified, each before its batch's update.
        loss: sum of the batches' mean losses.
        train_accuracy: ``total_correct`` as a fraction.
        validation_loss: mean over the validation examples, after the epoch.
        validation_accuracy: fraction of the validation examples, after the epoch.
        test_loss: mean over the test examples, after the epoch.
        test_accuracy: fraction of the test examples, after the epoch.
        seconds: training time, excluding compilation and evaluation.
        images_per_second: training examples divided by ``seconds``.
        input_wait_seconds: the part of ``seconds`` in which the devices waited for images.
    """

    epoch: int
    step: int
    total_correct: int
    loss: float
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    seconds: float
    images_per_second: float
    input_wait_seconds: float = 0.0
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    @property
    def selection_accuracy(self) -> float:
        """The accuracy that selects the best checkpoint: on the validation split, or on the test split without one."""
        return self.test_accuracy if self.validation_accuracy is None else self.validation_accuracy

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON, without the fields that are None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @cached_property
    def json_line(self) -> str:
        """The line of ``metrics.jsonl``: kept, because every later checkpoint contains it."""
        return json.dumps(self.to_json()) + "\n"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Convert from the result of ``to_json``."""
        return cls(**{"test_loss": None, "test_accuracy": None, **values})

    def line(self, width: int | None = None) -> str:
        """The line that the command prints, without the last fields if it would be longer than ``width`` columns."""
        split, accuracy, loss = ("test", self.test_accuracy, self.test_loss)
        if self.validation_accuracy is not None:
            split, accuracy, loss = ("validation", self.validation_accuracy, self.validation_loss)
        line = f"epoch: {self.epoch} total_correct: {self.total_correct} loss: {self.loss:.2f}"
        for field in (
            f" {split}_accuracy: {accuracy:.4f}",
            f" {split}_loss: {loss:.4f}",
            f" seconds: {self.seconds:.2f}",
            f" images_per_second: {self.images_per_second:.0f}",
        ):
            if width is not None and len(line + field) > width:
                break
            line += field
        return line

    def __str__(self) -> str:
        return self.line()


def reached_target(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch reached ``config.target_accuracy``; False if that is None or there is no epoch."""
    return (
        bool(history)
        and config.target_accuracy is not None
        and history[-1].selection_accuracy >= config.target_accuracy
    )


def ran_out_of_patience(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last ``config.patience`` epochs have not improved the validation accuracy; False if that is None."""
    if config.patience is None or not history:
        return False
    accuracies = [record.selection_accuracy for record in history]
    return len(history) - 1 - accuracies.index(max(accuracies)) >= config.patience
