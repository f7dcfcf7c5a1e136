"""``python -m cnn_jax.evaluate RUN``: how good a trained network is, class by class."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from cnn_jax import cli


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Score a run's network on the test examples of its data set."""

    run: Annotated[str, Positional, arg(metavar="RUN")]
    """The run directory that training made."""

    checkpoint: Literal["newest", "best"] = "newest"
    """The newest checkpoint, or the one of the best test accuracy."""

    data_dir: Annotated[str | None, arg(metavar="DIR")] = None
    """Where the data set lies now, if elsewhere than in training."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    flags = cli.parse(EvaluateFlags, args, module="cnn_jax.evaluate")
    # What follows is slow to import, and of no use to somebody who mistyped a flag.
    from cnn_jax import data
    from cnn_jax.report.tables import class_table, confused_pairs
    from cnn_jax.run import load_run

    run = load_run(flags.run, flags.checkpoint)
    config = run.config if flags.data_dir is None else dataclasses.replace(run.config, data_dir=flags.data_dir)
    evaluation = run.evaluate(data.load(config))
    print(
        f"dataset: {config.dataset} step: {int(run.state.step)} "
        f"test_accuracy: {evaluation.accuracy:.4f} test_loss: {evaluation.loss:.4f}\n"
    )
    print(class_table(evaluation.labels, evaluation.predictions, run.class_names))
    print(confused_pairs(evaluation.labels, evaluation.predictions, run.class_names))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
