"""``python -m cnn_jax.evaluate RUN``: how good a trained network is, class by class."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from cnn_jax import cli


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
    from cnn_jax import data
    from cnn_jax.config import Config
    from cnn_jax.report.tables import class_table, confused_pairs
    from cnn_jax.run import load_run

    run = load_run(flags.run, flags.checkpoint)
    config = run.config
    if flags.dataset is not None:
        height, width, channels = run.image_shape
        fitting = {"image_size": (height, width), "channels": channels, "skip_unreadable": flags.skip_unreadable}
        is_folder = flags.dataset.startswith("folder:")
        config = Config(dataset=flags.dataset, seed=config.seed, **fitting if is_folder else {})
    if flags.data_dir is not None:
        config = dataclasses.replace(config, data_dir=flags.data_dir)
    dataset = data.load(config)
    evaluation = run.evaluate(dataset)
    print(
        f"dataset: {dataset.name} step: {int(run.state.step)} "
        f"test_accuracy: {evaluation.accuracy:.4f} test_loss: {evaluation.loss:.4f}\n"
    )
    print(class_table(evaluation.labels, evaluation.predictions, run.class_names))
    print(confused_pairs(evaluation.labels, evaluation.predictions, run.class_names))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
