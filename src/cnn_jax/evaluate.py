"""``python -m cnn_jax.evaluate RUN``: the accuracy of a trained network, overall and by class."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnn_jax import cli
from cnn_jax.errors import printable
from cnn_jax.settings import Checkpoint, FilePath, Name, Settings, Switch, setting

if TYPE_CHECKING:
    from cnn_jax.data import Dataset
    from cnn_jax.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(Settings):
    """Evaluate a trained network on the test set of its dataset, or of another dataset with the same classes."""

    run: FilePath = setting("the run directory", metavar="RUN", positional=True)
    checkpoint: Checkpoint = setting("the newest checkpoint or the one with the best accuracy", default="newest")
    dataset: Name | None = setting(
        "another dataset, named as in training; the images of folder:PATH are resized and converted to the network's "
        "input, and its classes must be among the network's (default: the run's own)",
        default=None,
    )
    skip_unreadable: Switch = setting(
        "skip files in folder:PATH that cannot be read as images, and print how many", default=False
    )
    data_dir: FilePath | None = setting("the directory of the dataset, if it has moved", default=None, metavar="DIR")


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(EvaluateFlags, args, module="cnn_jax.evaluate")
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
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
    """Load the run's dataset or the one that the flags name, with the run's settings otherwise."""
    from cnn_jax import data
    from cnn_jax.data import folder

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
        validation_fraction=0.0,  # the test split does not depend on it
    )
    path = flags.dataset.removeprefix("folder:")
    if is_folder and path and not folder.has_splits(path) and folder.dataset_name(path) != run.config.dataset:
        return folder.load_unsplit(path, config)  # the network was not trained on any of these images
    return data.load(config)


if __name__ == "__main__":
    cli.start(main)
