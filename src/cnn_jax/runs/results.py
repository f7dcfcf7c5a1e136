"""The results of runs, from their run directories and their test images."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cnn_jax import data
from cnn_jax.config import Config, DataConfig
from cnn_jax.data import Dataset
from cnn_jax.data.store import ChangedImageError
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.checkpoint import Which
from cnn_jax.runs.run import Run, count_parameters, load_run
from cnn_jax.runs.summary import read_summary
from cnn_jax.runs.workdir import Workdir
from cnn_jax.training.comparison import ImageResults, RunResult


def load_results(
    workdirs: Sequence[str | Path],
    checkpoint: Which = "newest",
    *,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
) -> list[RunResult]:
    """Load runs and evaluate each of them on the test split that it has; each dataset is loaded once.

    A run whose own data cannot be loaded, or has changed since training, is not evaluated.

    Args:
        workdirs: the run directories.
        checkpoint: which checkpoint of each run.
        dataset: the name of the runs' dataset, if it is a folder that has moved; by default the runs' own.
        data_dir: the directory of the datasets, by default the runs' own.

    Raises:
        UsageError: the same run twice, not a run directory, or a run without training.
        CnnJaxError: the checkpoints of a run are damaged, or were written by another version of the package; or data
            that ``dataset`` or ``data_dir`` names cannot be loaded.
    """
    paths: list[Path] = []
    for workdir in map(Path, workdirs):
        Workdir(workdir).check_holds_run()
        if workdir.resolve() in paths:
            raise UsageError(f"{workdir} is named twice: name each run once")
        paths.append(workdir.resolve())
    runs = [_without_optimizer(load_run(path, checkpoint)) for path in paths]
    for run in runs:
        if not run.state.step:
            raise UsageError(f"{run.workdir} has no trained network: continue it with --resume, or leave it out")
    evaluations = _evaluate(runs, dataset, data_dir)
    return list(map(_result, short_names(paths), runs, evaluations))


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of different paths, with as few parts as necessary to be different."""
    length = 1
    while len(names := {str(Path(*path.parts[-length:])): None for path in paths}) < len(paths):
        length += 1
    return list(names)


def _without_optimizer(run: Run) -> Run:
    """The run without the state of the optimizer, which takes more memory than the parameters."""
    return replace(run, state=run.state.replace(opt_state=()))


def _evaluate(runs: Sequence[Run], dataset: str | None, data_dir: str | Path | None) -> list[ImageResults | str]:
    """The results of each run by test image, or the reason why there are none."""
    sharing = defaultdict(list)
    for index, run in enumerate(runs):
        sharing[_data_settings(run.config, dataset, data_dir)].append(index)
    results = {}
    for settings, indices in sharing.items():
        try:
            evaluated = list(_evaluate_sharing([runs[index] for index in indices], settings))
        except CnnJaxError as error:
            if dataset is not None or data_dir is not None:  # what the caller names is there, or it is an error
                raise
            evaluated = [str(error)] * len(indices)
        results |= zip(indices, evaluated, strict=True)
    return [results[index] for index in range(len(runs))]


def _data_settings(config: Config, dataset: str | None, data_dir: str | Path | None) -> Config:
    """A config with only the settings that the data depends on."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(DataConfig)}
    changes = {"dataset": dataset, "data_dir": None if data_dir is None else str(data_dir)}
    return Config(**settings | {name: value for name, value in changes.items() if value is not None})


def _evaluate_sharing(runs: Sequence[Run], settings: Config) -> Iterator[ImageResults | str]:
    """Evaluate runs with the same settings of the data on its test images, if they are theirs.

    Raises:
        CnnJaxError: the data cannot be loaded.
    """
    dataset = data.load(settings)
    try:
        sha256, digests, files = dataset.sha256, _digests(dataset), dataset.test.files
    except ChangedImageError as error:
        yield from [str(error)] * len(runs)
        return
    for run in runs:
        if run.data_sha256 != sha256:
            yield f"{dataset.name} is not the data that it was trained on, or has changed since"
            continue
        try:
            evaluation = run.evaluate(dataset)
        except ChangedImageError as error:
            yield str(error)
        else:
            correct = evaluation.labels == evaluation.predictions
            yield ImageResults(correct, evaluation.loss, dataset.name, digests, files)


def _digests(dataset: Dataset) -> list[bytes]:
    """A digest of the pixels and the class of each test image."""
    names = [f"{name}\n".encode(errors="surrogatepass") for name in dataset.class_names]
    images = map(np.ascontiguousarray, dataset.test.images)
    return [
        hashlib.sha256(names[label] + image.tobytes()).digest()
        for image, label in zip(images, dataset.test.labels, strict=True)
    ]


def _result(name: str, run: Run, images: ImageResults | str) -> RunResult:
    summary = read_summary(run.workdir)
    step = int(run.state.step)
    accuracy, loss = None, None
    if isinstance(images, ImageResults):
        accuracy, loss = float(images.correct.mean()), images.loss
    elif summary is not None and summary.steps == step:
        accuracy, loss = summary.test_accuracy, summary.test_loss
    elif run.history and run.history[-1].step == step:
        accuracy, loss = run.history[-1].test_accuracy, run.history[-1].test_loss
    only_in_summary = ("compile_seconds", "backend", "device", "device_count", "versions")
    return RunResult(
        name=name,
        workdir=run.workdir,
        config=run.config,
        image_shape=run.image_shape,
        class_names=run.class_names,
        data_sha256=run.data_sha256,
        history=run.history,
        step=step,
        num_parameters=count_parameters(run.state.params),
        images=images,
        test_accuracy=accuracy,
        test_loss=loss,
        **{} if summary is None else {field: getattr(summary, field) for field in only_in_summary},
    )
