"""Training from a config to a run directory: ``fit`` and ``resume``."""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cnn_jax import data
from cnn_jax.config import DETERMINISTIC_OPS, MAY_CHANGE, Config
from cnn_jax.data import Dataset, background
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import expanded
from cnn_jax.formats.weights import Tensor, open_weights, read_params, to_params
from cnn_jax.models import create_model
from cnn_jax.report import page, plots, tensorboard
from cnn_jax.runs.checkpoint import CheckpointWriter, holds_only_a_start, newest_metadata, restore
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.run import Run, count_parameters, load_config, load_run
from cnn_jax.runs.summary import summarize
from cnn_jax.runs.workdir import CONFIG, Workdir
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import ChunkReport, Progress, Trainer
from cnn_jax.training.sharding import replicate
from cnn_jax.training.state import TrainState

MIN_STEPS = 50
"""The number of steps after which a network should have learned something."""

logger = logging.getLogger("cnn_jax")


class StoppedError(CnnJaxError):
    """Training was stopped on request, after saving a checkpoint."""

    def __init__(self, workdir: Path, step: int):
        resume = f"python -m cnn_jax.train --resume --workdir {shlex.quote(str(workdir))}"
        super().__init__(f"stopped after step {step}: continue with {resume}")


class _Outputs(NamedTuple):
    """What ``fit`` writes and calls."""

    report: bool
    on_epoch: Callable[[EpochRecord], None]
    on_chunk: Callable[[ChunkReport], None]
    stop_requested: Callable[[], bool]


def fit(
    config: Config,
    workdir: str | Path | None = None,
    *,
    dataset: Dataset | None = None,
    devices: Sequence[jax.Device] | None = None,
    report: bool = True,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Run:
    """Train a network, and write checkpoints and a report to a run directory.

    Args:
        config: the settings.
        workdir: the run directory; by default ``runs/<dataset>-<model>-<time>``.
        dataset: the examples; by default the dataset that ``config`` names.
        devices: the devices to train on; by default all local devices.
        report: whether to write the plots and ``report.html`` at the end.
        on_epoch: called with the record of each epoch; ``print`` prints the same lines as the command.
        on_chunk: called with the progress of the epoch after each chunk of at most 100 steps.
        stop_requested: called before each chunk and between the files of the report; if it returns True, training
            saves a checkpoint and stops.

    Returns:
        The trained network.

    Raises:
        UsageError: a setting or the data cannot be used, or the run directory is not empty.
        CnnJaxError: the data cannot be downloaded, a file cannot be written, or the loss is not finite.
        StoppedError: a stop was requested.
    """
    _check_usable(config)
    config = _with_absolute_paths(config)
    _check_weights(config)
    directory = None if workdir is None else Workdir(Path(workdir))
    if directory is not None:
        directory.check_unused()
    config, dataset = _resolve(config, dataset)
    trainer = Trainer(config, dataset, devices)
    start = _start(trainer, config, dataset)
    directory = directory or Workdir(_make_default_workdir(config))
    directory.create()
    with directory.locked():
        directory.check_unused()  # again: another process may have created it
        metadata = _describe(config, trainer, dataset)
        outputs = _Outputs(report, on_epoch, on_chunk, stop_requested)
        return _train(directory, trainer, dataset, metadata, start, outputs)


def resume(
    workdir: str | Path,
    *,
    dataset: Dataset | str | None = None,
    devices: Sequence[jax.Device] | None = None,
    report: bool = True,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> Run:
    """Continue a run from its newest checkpoint.

    The final parameters are bitwise equal to those of an uninterrupted run. Because the learning rate is constant, this
    also holds if ``epochs`` is increased.

    Args:
        workdir: the run directory.
        dataset: the examples the run was trained on, or the name of their dataset as in the config; by default the
            dataset that the config names.
        devices: as in ``fit``; with a different number of devices the results agree up to rounding.
        report: as in ``fit``.
        on_epoch: as in ``fit``.
        on_chunk: as in ``fit``.
        stop_requested: as in ``fit``.
        **changes: new values of settings; settings that determine the result cannot be changed.

    Returns:
        The trained network.

    Raises:
        UsageError: not a run directory, or settings or data differ from the run's.
        CnnJaxError: as in ``fit``, or all checkpoints are damaged.
        StoppedError: a stop was requested.
    """
    directory = Workdir(Path(workdir))
    if isinstance(dataset, str):
        changes, dataset = changes | {"dataset": dataset}, None
    config = _with_absolute_paths(dataclasses.replace(load_config(directory.path), **changes))
    _check_usable(config)
    saved = _saved_metadata(directory)
    trained = load_config(directory.path) if saved is None else saved.config
    if dataset is None and config.dataset != "auto":  # before the data is read, which may take long
        _check_same(config, trained, directory)
    config, dataset = _resolve(config, dataset)
    _check_same(config, trained, directory)
    trainer = Trainer(config, dataset, devices)
    start = _start(trainer, config, dataset) if saved is None else None
    directory.create()
    with directory.locked():
        metadata = _describe(config, trainer, dataset)
        if start is None:
            start, history = _restore(trainer, directory, metadata)
            metadata = metadata.at(history, start)
        if start.step > config.epochs * trainer.steps_per_epoch:
            epoch = -(-start.step // trainer.steps_per_epoch)
            raise UsageError(f"{directory.path} is already in epoch {epoch}: --epochs must be at least {epoch}")
        outputs = _Outputs(report, on_epoch, on_chunk, stop_requested)
        return _train(directory, trainer, dataset, metadata, start, outputs)


def reached_target(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch reached ``config.target_accuracy``; False if that is None or there is no epoch."""
    return (
        bool(history)
        and config.target_accuracy is not None
        and history[-1].selection_accuracy >= config.target_accuracy
    )


def _train(
    directory: Workdir,
    trainer: Trainer,
    dataset: Dataset,
    metadata: RunMetadata,
    progress: Progress,
    outputs: _Outputs,
) -> Run:
    """Train from ``progress`` to the end, writing all files of the run directory."""
    config, history = metadata.config, list(metadata.history)
    directory.write_config(config)  # first, so that the run can be resumed from here on
    with CheckpointWriter(directory.checkpoints) as checkpoints, contextlib.ExitStack() as stack:

        def save(progress: Progress, accuracy: float | None = None) -> None:
            trainer.check_finite(progress.metrics)
            checkpoints.save(progress.state, metadata.at(history, progress).to_json(), accuracy)

        def stop_if_requested(progress: Progress) -> None:
            if outputs.stop_requested():
                save(progress)
                raise StoppedError(directory.path.absolute(), progress.step)

        def before_chunk(progress: Progress) -> None:
            stop_if_requested(progress)
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0 and progress.step > 0:
                save(progress)

        save(progress)
        checkpoints.wait()
        logger.info(_first_line(trainer, dataset, config.model))
        directory.write_history(history)
        on_record = [directory.append_history, outputs.on_epoch]
        if config.tensorboard:
            events = tensorboard.EventFiles(directory.path / "tensorboard", history, trainer.steps_per_epoch)
            on_record.insert(1, stack.enter_context(events).append)
        compile_seconds = trainer.compile()
        epochs = trainer.epochs(progress, on_chunk=outputs.on_chunk, before_chunk=before_chunk)
        for record, progress in () if reached_target(config, history) else epochs:
            history.append(record)
            save(progress, record.selection_accuracy)
            for call in on_record:
                call(record)
            if record.step >= MIN_STEPS > record.step - trainer.steps_per_epoch:
                _warn_if_untrained(record, trainer.steps_per_epoch, len(dataset.class_names))
            if reached_target(config, history):
                break
        stop_if_requested(progress)
        summary, logits = _evaluate(trainer, config, history, dataset, progress.state, compile_seconds)
        directory.write_summary(summary)
        report = _report(config, history, trainer.steps_per_epoch, dataset, logits, summary) if outputs.report else {}
        for name, write in report.items():
            stop_if_requested(progress)
            with directory.replacing(name) as path:
                write(path)
        stop_if_requested(progress)
    state = jax.device_put(progress.state, jax.devices()[0])  # on one device, as load_run returns it
    return Run.of(directory, dataclasses.replace(metadata, history=tuple(history)), trainer.task, state)


def _evaluate(
    trainer: Trainer,
    config: Config,
    history: Sequence[EpochRecord],
    dataset: Dataset,
    state: TrainState,
    compile_seconds: float,
) -> tuple[dict[str, Any], np.ndarray]:
    """Score the final parameters on the test split; return the summary of the run and the logits."""
    score, logits = trainer.evaluate(state, "test")
    if history[-1].step >= MIN_STEPS:
        _warn_if_constant(logits, dataset)
    summary = summarize(
        config,
        history,
        dataset,
        num_parameters=count_parameters(state.params),
        test_score=score,
        compile_seconds=compile_seconds,
        devices=trainer.mesh.devices.ravel().tolist(),
    )
    return summary, logits


def _first_line(trainer: Trainer, dataset: Dataset, model: str) -> str:
    """What is trained, on what data and devices."""
    counts = " and ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    shape, num_parameters = "x".join(map(str, dataset.image_shape)), count_parameters(trainer.abstract_state.params)
    devices = trainer.mesh.devices.flat
    devices = f"{len(devices)} {devices[0].platform.upper()} device{'s' if len(devices) > 1 else ''}"
    return (
        f"{dataset.name}: {counts} images of {shape} in {len(dataset.class_names)} classes; {model}: "
        f"{num_parameters:,} parameters; {devices}"
    )


def _report(
    config: Config,
    history: Sequence[EpochRecord],
    steps_per_epoch: int,
    dataset: Dataset,
    logits: np.ndarray,
    summary: Mapping[str, Any],
) -> dict[str, Callable[[Path], None]]:
    """The functions that write the files of the report, by name; ``logits`` are those of the test examples."""
    labels, predictions = dataset.test.labels, logits.argmax(axis=-1)
    return {
        "curves.png": lambda path: plots.save_curves(path, history, steps_per_epoch),
        "confusion.png": lambda path: plots.save_confusion(path, labels, predictions, dataset.class_names),
        "report.html": lambda path: page.save_page(
            path,
            config=config,
            history=history,
            steps_per_epoch=steps_per_epoch,
            dataset=dataset,
            logits=logits,
            test_loss=summary["test_loss"],
            num_parameters=summary["num_parameters"],
            summary=summary,
        ),
    }


def _warn_if_untrained(record: EpochRecord, steps_per_epoch: int, num_classes: int) -> None:
    """Warn if the training loss is that of predicting every class with the same probability, or higher."""
    loss, chance = record.loss / steps_per_epoch, math.log(num_classes)
    if loss > 0.99 * chance:
        logger.warning(
            "the network is not learning: the training loss is %.4f after epoch %d, and %.4f is that of guessing; try "
            "a lower --learning-rate",
            loss,
            record.epoch,
            chance,
        )


def _warn_if_constant(logits: np.ndarray, dataset: Dataset) -> None:
    """Warn if the network predicts the same class for all test images, which are of several."""
    predictions = np.unique(logits.argmax(axis=-1))
    if len(predictions) == 1 and len(np.unique(dataset.test.labels)) > 1:
        logger.warning(
            "the network predicts %s for every test image: try a lower --learning-rate",
            dataset.class_names[predictions[0]],
        )


def _check_usable(config: Config) -> None:
    """Raise UsageError for an unknown model, or if an environment variable or a package is missing."""
    create_model(config.model, num_classes=2)
    if config.deterministic and jax.default_backend() == "gpu" and DETERMINISTIC_OPS not in os.getenv("XLA_FLAGS", ""):
        raise UsageError(f"deterministic on a GPU needs XLA_FLAGS={DETERMINISTIC_OPS}: set it before jax initializes")
    if config.tensorboard:
        tensorboard.check_installed()


def _resolve(config: Config, dataset: Dataset | None) -> tuple[Config, Dataset]:
    """Load the dataset if none is given, and put its name into the config."""
    if dataset is None:
        dataset = data.load(config)
    else:
        dataset = data.with_validation(dataset, config.validation_fraction, config.split_seed)
    return dataclasses.replace(config, dataset=dataset.name), dataset


def _with_absolute_paths(config: Config) -> Config:
    paths = {name: getattr(config, name) for name in ("data_dir", "init_from")}
    absolute = {name: str(expanded(path).absolute()) for name, path in paths.items() if path is not None}
    return dataclasses.replace(config, **absolute)


def _check_weights(config: Config) -> None:
    """Raise UsageError unless the initial weights can be read: before the data is, which may take long."""
    if config.init_from is None:
        return
    path = Path(config.init_from)
    if path.is_dir():
        load_config(path)
    else:
        open_weights(path)


def _make_default_workdir(config: Config) -> Path:
    dataset = f"folder-{Path(config.dataset).name}"[:100] if config.dataset.startswith("folder:") else config.dataset
    name = re.sub(r"[^\w.-]+", "-", f"{dataset}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # runs started within the same second have the same name
            continue
        except OSError as error:
            raise UsageError(f"cannot create {path.absolute()} ({error.strerror}): choose a --workdir") from None
        return path


def _start(trainer: Trainer, config: Config, dataset: Dataset) -> Progress:
    """The initial training progress, with the weights of ``config.init_from`` if it is set."""
    start = trainer.start()
    if config.init_from is None:
        return start
    path, target = Path(config.init_from), start.state.params
    if path.is_dir():
        tensors = jax.tree.map(Tensor.of, load_run(path).state.params)
        params = to_params(flatten_dict(tensors, sep="."), target, dataset.image_shape, path)
    else:
        params = read_params(path, target, dataset.image_shape)
    return dataclasses.replace(start, state=start.state.replace(params=replicate(params, trainer.mesh)))


def _saved_metadata(directory: Workdir) -> RunMetadata | None:
    """The metadata of the newest checkpoint; None if the run was stopped before its first checkpoint."""
    if not directory.is_started and holds_only_a_start(directory.checkpoints):
        return None
    return RunMetadata.from_json(newest_metadata(directory.checkpoints), directory.path)


def _check_same(config: Config, trained: Config, directory: Workdir) -> None:
    """Raise UsageError if settings that cannot be changed on resume differ from those that the run was trained with.

    These are the settings in the checkpoint, because ``config.yaml`` may have been edited.
    """
    before, now = dataclasses.asdict(trained), dataclasses.asdict(config)
    may_change = set(MAY_CHANGE)
    if all(config["dataset"].startswith("folder:") for config in (before, now)):
        may_change.add("dataset")  # a folder may have moved: _restore compares the images
    different = [name for name in now if now[name] != before[name] and name not in may_change]
    if different:
        differences = ", ".join(f"{name} was {before[name]} and is now {now[name]}" for name in different)
        raise UsageError(
            f"the run in {directory.path} was trained with other settings: {differences}; use the same settings, also "
            f"in {CONFIG}, or choose another --workdir"
        )


def _describe(config: Config, trainer: Trainer, dataset: Dataset) -> RunMetadata:
    """The metadata of a run before its first step."""
    return RunMetadata(
        config=config,
        device_count=trainer.mesh.size,
        image_shape=dataset.image_shape,
        class_names=dataset.class_names,
        data_sha256=dataset.sha256,
        preprocess=trainer.task.preprocess,
        dark_background=background.is_dark(dataset.train.images),
    )


def _restore(trainer: Trainer, directory: Workdir, now: RunMetadata) -> tuple[Progress, list[EpochRecord]]:
    """Restore the progress and the finished epochs from the newest checkpoint."""

    def target(values: dict[str, Any]) -> TrainState:
        if RunMetadata.from_json(values, directory.path).data_sha256 != now.data_sha256:
            raise UsageError(
                f"the dataset changed since the run in {directory.path} was trained: restore its images and classes, "
                "or train in another --workdir"
            )
        return trainer.abstract_state

    state, values = restore(directory.checkpoints, target)
    saved, step = RunMetadata.from_json(values, directory.path), int(state.step)
    ends = [((number + 1) * trainer.steps_per_epoch, number) for number in range(len(saved.history))]
    if (
        len(saved.history) != step // trainer.steps_per_epoch
        or [(record.step, record.epoch) for record in saved.history] != ends
    ):
        raise CnnJaxError(
            f"the epochs of the run in {directory.path} do not have {trainer.steps_per_epoch} steps: resume it with "
            "the dataset it was trained on"
        )
    if saved.device_count != trainer.mesh.size:
        logger.warning(
            "%s was trained on %d device(s) and is resumed on %d: results agree up to rounding, but not bitwise",
            directory.path,
            saved.device_count,
            trainer.mesh.size,
        )
    return Progress(step, state, saved.epoch_metrics, saved.epoch_seconds), list(saved.history)
