"""``python -m cnn_jax.evaluate RUN``: how good a trained network is, class by class."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from cnn_jax import cli
from cnn_jax.errors import printable

if TYPE_CHECKING:
    from cnn_jax.data import Dataset
    from cnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Score a run's network on the test examples of its data set, or of another one that it fits."""

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """The run directory that training made."""

    checkpoint: Literal["newest", "best"] = "newest"
    """The newest checkpoint, or the one of the best test accuracy."""

    dataset: Annotated[str | None, arg(metavar="NAME")] = None
    """Another data set than the run's own, by the names that training takes; folder:PATH is brought to the run's size
    and colours, and its classes must be among the run's."""

    skip_unreadable: Annotated[bool, FlagCreatePairsOff] = False
    """Leave out the files of folder:PATH that cannot be read as images, and say how many they are."""

    data_dir: Annotated[str | None, arg(metavar="DIR")] = None
    """Where the data set lies now, if elsewhere than in training."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    flags = cli.parse(EvaluateFlags, args, module="cnn_jax.evaluate")
    # What follows is slow to import, and of no use to somebody who mistyped a flag.
    from cnn_jax.report.tables import class_table, confused_pairs
    from cnn_jax.runs.run import load_run

    run = load_run(flags.run, flags.checkpoint)
    dataset = _load(run, flags)
    evaluation = run.evaluate(dataset)
    print(
        f"dataset: {printable(dataset.name)} step: {int(run.state.step)} test_accuracy: {evaluation.accuracy:.4f} "
        f"test_loss: {evaluation.loss:.4f} examples: {len(evaluation.labels)}\n"
    )
    print(class_table(evaluation.labels, evaluation.predictions, run.class_names))
    print(confused_pairs(evaluation.labels, evaluation.predictions, run.class_names))
    return 0


def _load(run: "Run", flags: EvaluateFlags) -> "Dataset":
    """The run's data set, or the one that the flags name, by the run's settings but for what they change."""
    from cnn_jax import data

    config = dataclasses.replace(run.config, data_dir=flags.data_dir or run.config.data_dir)
    if flags.dataset is None:
        return data.load(dataclasses.replace(config, skip_unreadable=flags.skip_unreadable or config.skip_unreadable))
    is_folder = flags.dataset.startswith("folder:")
    config = dataclasses.replace(
        config,
        dataset=flags.dataset,
        image_size=run.image_shape[:2] if is_folder else None,
        channels=run.image_shape[2] if is_folder else None,
        skip_unreadable=flags.skip_unreadable,
    )
    dataset = data.load(config)
    has_test_split = is_folder and Path(dataset.name.removeprefix("folder:"), "test").is_dir()
    if not is_folder or has_test_split or dataset.name == run.config.dataset:
        return dataset
    # Of a folder that the network has not seen nothing need be held out.
    splits = (dataset.train, dataset.test)
    images, labels = (np.concatenate(arrays) for arrays in zip(*((s.images, s.labels) for s in splits), strict=True))
    return dataclasses.replace(dataset, test=data.Split(images, labels))


if __name__ == "__main__":
    cli.start(main)
