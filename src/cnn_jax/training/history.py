"""The history of a training: a record for each epoch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one epoch; as text, the line that the command prints.

    Without a validation split the test split is scored after each epoch; with one, the validation split is, and the
    fields of the test split are None.

    Attributes:
        epoch: counted from 0.
        step: steps taken since training began.
        total_correct: training examples predicted correctly, each before the update it took part in.
        loss: sum of the batches' mean losses.
        train_accuracy: ``total_correct`` as a fraction.
        validation_loss: mean over the validation examples, after the epoch.
        validation_accuracy: fraction of the validation examples, after the epoch.
        test_loss: mean over the test examples, after the epoch.
        test_accuracy: fraction of the test examples, after the epoch.
        seconds: training time, without compilation and evaluation.
        images_per_second: training examples over ``seconds``.
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
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    @property
    def selection_accuracy(self) -> float:
        """The accuracy by which the best checkpoint is chosen: of the validation split if there is one."""
        return self.test_accuracy if self.validation_accuracy is None else self.validation_accuracy

    def to_json(self) -> dict[str, Any]:
        """The fields that have a value, for a line of ``metrics.jsonl``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The record that ``to_json`` gave."""
        return cls(**{"test_loss": None, "test_accuracy": None, **values})

    def __str__(self) -> str:
        split, accuracy, loss = ("test", self.test_accuracy, self.test_loss)
        if self.validation_accuracy is not None:
            split, accuracy, loss = ("validation", self.validation_accuracy, self.validation_loss)
        return (
            f"epoch: {self.epoch} total_correct: {self.total_correct} loss: {self.loss:.2f} "
            f"{split}_accuracy: {accuracy:.4f} {split}_loss: {loss:.4f} "
            f"seconds: {self.seconds:.2f} images_per_second: {self.images_per_second:.0f}"
        )
