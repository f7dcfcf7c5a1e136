"""``python -m cnn_jax.evaluate RUN``: the accuracy of a trained network, overall and by class."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnn_jax import cli
from cnn_jax.errors import UsageError, printable
from cnn_jax.settings import Checkpoint, FilePath, Name, Settings, Switch, setting

if TYPE_CHECKING:
    from cnn_jax.data import Dataset
    from cnn_jax.runs.run import Evaluation, Run


MAX_CLASSES = 1000
"""The maximum number of classes to print a confusion matrix for, which has as many entries as their square."""


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
    from cnn_jax.runs import evaluation_data
    from cnn_jax.runs.run import load_run

    # The files are opened first, so that one that cannot be written is reported at once.
    with cli.writing(flags.predictions) as predictions, cli.writing(flags.report) as report:
        run, dataset = evaluation_data.load(
            load_run(flags.run, flags.checkpoint),
            flags.dataset,
            data_dir=flags.data_dir,
            skip_unreadable=flags.skip_unreadable,
        )
        evaluation = run.evaluate(dataset)
        if predictions is not None:
            with cli.reporting(flags.predictions):
                _save_predictions(predictions, dataset, evaluation)
        if report is not None:
            with cli.reporting(flags.report):
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
    from cnn_jax.report.tables import class_scores, confusion_counts

    counts = confusion_counts(evaluation.labels, evaluation.predictions, len(run.class_names))

    return json.dumps(
        {
            "dataset": dataset.name,
            "step": int(run.state.step),
            "test_accuracy": evaluation.accuracy,
            "test_loss": evaluation.loss if math.isfinite(evaluation.loss) else None,  # JSON has no infinity
            "examples": len(evaluation.labels),
            **class_scores(evaluation.labels, evaluation.predictions, run.class_names),
            "confusion_matrix": counts.toarray().tolist() if len(run.class_names) <= MAX_CLASSES else None,
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


if __name__ == "__main__":
    cli.start(main)
