"""``python -m cnn_jax.evaluate RUN``: the accuracy of a trained network, overall and by class."""

import csv
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnn_jax import cli, files
from cnn_jax.errors import CnnJaxError, UsageError, printable
from cnn_jax.settings import Checkpoint, FilePath, Name, Settings, Switch, setting

if TYPE_CHECKING:
    import numpy as np

    from cnn_jax.data import Dataset
    from cnn_jax.runs.run import Evaluation, Run

logger = logging.getLogger("cnn_jax")


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
    json: Switch = setting("print the result as one JSON object, including the confusion matrix", default=False)
    predictions: FilePath | None = setting(
        "also write the prediction for each test image to a CSV file", default=None, metavar="FILE"
    )
    report: FilePath | None = setting(
        "also write a report like the run's report.html, of this evaluation", default=None, metavar="FILE"
    )


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    flags = cli.parse(EvaluateFlags, args, module="cnn_jax.evaluate")
    if flags.predictions is not None and flags.predictions == flags.report:
        raise UsageError("--predictions and --report name the same file: choose another for one of them")
    cli.initialize_jax()
    # Slow imports come after the flags are parsed.
    from cnn_jax.runs.run import load_run

    # The files are opened first, so that one that cannot be written is reported at once.
    with _writing(flags.predictions) as predictions, _writing(flags.report) as report:
        run = _with_moved_folder(load_run(flags.run, flags.checkpoint), flags.dataset)
        dataset = run.aligned(_load(run, flags))
        evaluation = run.evaluate(dataset)
        if dataset.name != run.config.dataset:
            _warn_of_training_images(run, dataset)
        if predictions is not None:
            with _reporting(flags.predictions):
                _save_predictions(predictions, dataset, evaluation)
        if report is not None:
            with _reporting(flags.report):
                _save_report(report, run, dataset, evaluation)
    print(_json(run, dataset, evaluation) if flags.json else _text(run, dataset, evaluation))
    return 0


def _text(run: "Run", dataset: "Dataset", evaluation: "Evaluation") -> str:
    from cnn_jax.report.tables import class_table, confused_pairs

    results = (evaluation.labels, evaluation.predictions, run.class_names)
    return (
        f"dataset: {printable(dataset.name)} step: {int(run.state.step)} test_accuracy: {evaluation.accuracy:.4f} "
        f"test_loss: {evaluation.loss:.4f} examples: {len(evaluation.labels)}\n\n"
        f"{class_table(*results)}\n{confused_pairs(*results)}"
    )


def _json(run: "Run", dataset: "Dataset", evaluation: "Evaluation") -> str:
    from cnn_jax.report.tables import class_scores

    return json.dumps(
        {
            "dataset": dataset.name,
            "step": int(run.state.step),
            "test_accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss if math.isfinite(evaluation.loss) else None,  # JSON has no infinity
            "examples": len(evaluation.labels),
            **class_scores(evaluation.labels, evaluation.predictions, run.class_names),
        }
    )


def _save_predictions(path: Path, dataset: "Dataset", evaluation: "Evaluation") -> None:
    """Write a row for each test image, named by its file in a folder or else by its index."""
    names, test = dataset.class_names, dataset.test
    # A file name may not be valid Unicode: its bytes are written as they are.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index" if test.files is None else "file", "label", "prediction", "probability"])
        for name, label, prediction, probability in zip(
            range(len(test)) if test.files is None else test.files,
            evaluation.labels,
            evaluation.predictions,
            evaluation.probabilities.max(axis=-1),
            strict=True,
        ):
            writer.writerow([name, names[label], names[prediction], f"{probability:.6f}"])


def _resolved(name: str) -> str:
    """The name that a dataset has after it is loaded: a folder with its absolute path."""
    from cnn_jax.data import folder

    path = name.removeprefix("folder:")
    return folder.dataset_name(path) if name.startswith("folder:") and path else name


def _with_moved_folder(run: "Run", name: str | None) -> "Run":
    """The run, with the new path of its folder of images if another dataset is given and has the same content."""
    from cnn_jax import data

    if name is None or not (name.startswith("folder:") and run.config.dataset.startswith("folder:")):
        return run
    config = dataclasses.replace(run.config, dataset=_resolved(name))
    try:
        same = config.dataset != run.config.dataset and data.load(config).sha256 == run.data_sha256
    except UsageError:  # such as classes of too few images to hold out any
        return run
    if not same:
        return run
    logger.info("%s has the images of the run's own dataset: scoring its test split", config.dataset)
    return dataclasses.replace(run, config=config)


def _load(run: "Run", flags: EvaluateFlags) -> "Dataset":
    """Load the run's dataset or the one that the flags name, with the run's settings otherwise."""
    from cnn_jax import data
    from cnn_jax.data import folder

    config = dataclasses.replace(run.config, data_dir=flags.data_dir or run.config.data_dir)
    name = run.config.dataset if flags.dataset is None else _resolved(flags.dataset)
    if name == run.config.dataset:
        return data.load(dataclasses.replace(config, skip_unreadable=flags.skip_unreadable or config.skip_unreadable))
    is_folder = name.startswith("folder:")
    config = dataclasses.replace(
        config,
        dataset=name,
        image_size=run.image_shape[:2] if is_folder else None,
        channels=run.image_shape[2] if is_folder else None,
        skip_unreadable=flags.skip_unreadable,
        validation_fraction=0.0,  # the test split does not depend on it
    )
    path = name.removeprefix("folder:")
    if is_folder and path and not folder.has_splits(path):
        return folder.load_unsplit(path, config)  # the network was not trained on any of these images
    return data.load(config)


def _save_report(path: Path, run: "Run", dataset: "Dataset", evaluation: "Evaluation") -> None:
    from cnn_jax.report.page import save_page
    from cnn_jax.runs.run import count_parameters

    save_page(
        path,
        config=run.config,
        history=run.history,
        steps_per_epoch=run.history[0].step if run.history else 1,
        dataset=dataset,
        logits=evaluation.logits,
        test_loss=evaluation.loss,
        num_parameters=count_parameters(run.state.params),
    )


@contextmanager
def _writing(name: str | None) -> Iterator[Path | None]:
    """Yield a temporary file that replaces the named one when the context is left without an error; None if it is None.

    Raises:
        UsageError: the file cannot be created.
    """
    if name is None:
        yield None
        return
    path = Path(os.path.realpath(files.expanded(name)))  # a symbolic link stays one
    with ExitStack() as stack:
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is not a regular file: choose another file")
            temporary = stack.enter_context(files.replacing(path))
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error.strerror}): choose another file") from None
        yield temporary


@contextmanager
def _reporting(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CnnJaxError(f"cannot write {name} ({error.strerror}): free some space, or choose another file") from None


def _warn_of_training_images(run: "Run", dataset: "Dataset") -> None:
    """Warn if test images of another dataset are among the run's training images, or if that is not known."""
    from cnn_jax import data

    try:
        train = data.load(run.config).train
    except CnnJaxError as error:
        logger.warning("not checked whether the network was trained on test images: %s", error)
        return
    if count := count_shared(dataset.test.images, train.images):
        logger.warning(
            "%d of the %d test images are among the run's training images: the accuracy is too high",
            count,
            len(dataset.test),
        )


def count_shared(images: "np.ndarray", others: "np.ndarray") -> int:
    """The number of images that are also among others, with the same pixels.

    Args:
        images: uint8 ``[N, H, W, C]``.
        others: uint8 ``[M, H, W, C]``.
    """
    import numpy as np

    from cnn_jax.data.splits import content_hashes

    hashes, known = (content_hashes(map(np.ascontiguousarray, part), 0, "test") for part in (images, others))
    return int(np.isin(hashes, known).sum())


if __name__ == "__main__":
    cli.start(main)
