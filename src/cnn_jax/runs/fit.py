"""Training from a config to a run directory: ``fit`` and ``resume``."""

import contextlib
import dataclasses
import itertools
import logging
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, background
from cnn_jax.data.store import ChangedImageError
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import expanded
from cnn_jax.formats.weights import Weights
from cnn_jax.report import tensorboard
from cnn_jax.runs.checkpoint import CheckpointWriter, holds_only_a_start, newest_metadata, restore
from cnn_jax.runs.checks import check_dataset, check_same, check_usable
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.outputs import MIN_STEPS, first_line, report_files, warn_if_constant, warn_if_untrained
from cnn_jax.runs.pretrained import is_published, open_pretrained
from cnn_jax.runs.run import Run, count_parameters, load_config
from cnn_jax.runs.summary import summarize
from cnn_jax.runs.workdir import Workdir
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import ChunkReport, Progress, Trainer, create_task_for
from cnn_jax.training.metrics import CrossEntropy
from cnn_jax.training.sharding import replicate
from cnn_jax.training.state import TrainState

logger = logging.getLogger("cnn_jax")


class StoppedError(CnnJaxError):
    """Training was stopped on request, after saving a checkpoint."""

    def __init__(self, workdir: Path, step: int):
        super().__init__(f"stopped after step {step}: continue with {_resume_command(workdir)}")


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
    check_usable(config)
    config = _with_absolute_paths(config)
    weights = _open_weights(config)
    directory = None if workdir is None else Workdir(Path(workdir))
    if directory is not None:
        directory.check_unused()
    config, dataset = _resolve(config, dataset)
    check_dataset(config, dataset)
    trainer = _create_trainer(config, dataset, devices, weights)
    start = _start(trainer, config, dataset, weights)
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

    The final parameters are bitwise equal to those of an uninterrupted run. With a constant learning rate, this also
    holds if ``epochs`` is increased; the other schedules depend on it, so there it cannot be changed.

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
    check_usable(config)
    saved = _saved_metadata(directory)
    trained = load_config(directory.path) if saved is None else saved.config
    if dataset is None and config.dataset != "auto":  # before the data is read, which may take long
        check_same(config, trained, directory)
    config, dataset = _resolve(config, dataset)
    check_same(config, trained, directory)
    check_dataset(config, dataset)
    weights = _open_weights(config) if saved is None else None
    trainer = _create_trainer(config, dataset, devices, saved or weights)
    start = _start(trainer, config, dataset, weights) if saved is None else None
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


def ran_out_of_patience(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last ``config.patience`` epochs have not improved the validation accuracy; False if that is None."""
    if config.patience is None or not history:
        return False
    accuracies = [record.selection_accuracy for record in history]
    return len(history) - 1 - accuracies.index(max(accuracies)) >= config.patience


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

        before_last_chunk: Progress | None = None

        def before_chunk(progress: Progress) -> None:
            nonlocal before_last_chunk
            before_last_chunk = progress
            stop_if_requested(progress)
            if config.checkpoint_every and progress.step % config.checkpoint_every == 0 and progress.step > 0:
                save(progress)

        def save_before_chunk() -> None:
            """Save the progress before the chunk whose images could not be read, not before one that was taken."""
            if before_last_chunk and not any(leaf.is_deleted() for leaf in jax.tree.leaves(before_last_chunk.state)):
                save(before_last_chunk)

        stack.enter_context(_when_images_change(save_before_chunk, directory.path))
        save(progress)
        checkpoints.wait()
        logger.info(first_line(trainer, dataset, config.model))
        directory.write_history(history)
        on_record = [directory.append_history, outputs.on_epoch]
        if config.tensorboard:
            events = tensorboard.EventFiles(directory.path / "tensorboard", history, trainer.steps_per_epoch)
            on_record.insert(1, stack.enter_context(events).append)
        compile_seconds = trainer.compile()
        epochs = trainer.epochs(progress, on_chunk=outputs.on_chunk, before_chunk=before_chunk)
        for record, progress in () if _is_finished(config, history) else epochs:
            history.append(record)
            before_last_chunk = None
            save(progress, record.selection_accuracy)
            for call in on_record:
                call(record)
            is_time = record.step >= MIN_STEPS > record.step - trainer.steps_per_epoch
            if is_time and trainer.task.loss == CrossEntropy() and not trainer.task.augment.mixes:
                warn_if_untrained(record, trainer.steps_per_epoch, len(dataset.class_names))
            if _is_finished(config, history):
                break
        stop_if_requested(progress)
        summary, logits = _evaluate(trainer, config, history, dataset, progress.state, compile_seconds)
        directory.write_summary(summary)
        report = (
            report_files(config, history, trainer.steps_per_epoch, dataset, logits, summary) if outputs.report else {}
        )
        for name, write in report.items():
            stop_if_requested(progress)
            with directory.replacing(name) as path:
                write(path)
        stop_if_requested(progress)
    state = jax.device_put(progress.state, jax.devices()[0])  # on one device, as load_run returns it
    return Run.of(directory, dataclasses.replace(metadata, history=tuple(history)), trainer.task, state)


@contextlib.contextmanager
def _when_images_change(save: Callable[[], None], workdir: Path) -> Iterator[None]:
    """Save the progress if an image that is decoded whenever it is used has changed, and say how to continue."""
    try:
        yield
    except ChangedImageError as error:
        save()
        raise ChangedImageError(f"{error}, then continue with {_resume_command(workdir.absolute())}") from None


def _resume_command(workdir: Path) -> str:
    return f"python -m cnn_jax.train --resume --workdir {shlex.quote(str(workdir))}"


def _is_finished(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether training stops before the last epoch."""
    return reached_target(config, history) or ran_out_of_patience(config, history)


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
        warn_if_constant(logits, dataset)
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


def _resolve(config: Config, dataset: Dataset | None) -> tuple[Config, Dataset]:
    """Load the dataset if none is given, and put its name into the config."""
    if dataset is None:
        dataset = data.load(config)
    else:
        dataset = data.with_validation(dataset, config.validation_fraction, config.split_seed)
    return dataclasses.replace(config, dataset=dataset.name), dataset


def _with_absolute_paths(config: Config) -> Config:
    paths = {name: getattr(config, name) for name in ("data_dir", "init_from")}
    absolute = {
        name: str(expanded(path).absolute())
        for name, path in paths.items()
        if path is not None and not is_published(path)
    }
    return dataclasses.replace(config, **absolute)


def _open_weights(config: Config) -> Weights | None:
    """The weights to start from: opened before the data is read, which may take long. None for random weights."""
    return None if config.init_from is None else open_pretrained(config.init_from)


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


def _create_trainer(
    config: Config, dataset: Dataset, devices: Sequence[jax.Device] | None, source: RunMetadata | Weights | None
) -> Trainer:
    """Create a trainer with the preprocessing of ``source``, the run to resume or pretrained weights, if known."""
    preprocess = source.preprocess if source is not None and config.normalize else None
    return Trainer(config, dataset, devices, create_task_for(config, dataset, preprocess))


def _start(trainer: Trainer, config: Config, dataset: Dataset, weights: Weights | None) -> Progress:
    """The initial training progress, with weights to start from if there are any."""
    start = trainer.start()
    if weights is None:
        return start
    target = {"params": start.state.params, **start.state.model_state}
    variables = weights.variables(config.model, target, dataset.image_shape, dataset.class_names)
    params, model_state = replicate((variables.pop("params"), variables), trainer.mesh)
    averaged = None if start.state.averaged_params is None else jax.tree.map(jnp.copy, params)
    state = start.state.replace(params=params, model_state=model_state, averaged_params=averaged)
    return dataclasses.replace(start, state=state)


def _saved_metadata(directory: Workdir) -> RunMetadata | None:
    """The metadata of the newest checkpoint; None if the run was stopped before its first checkpoint."""
    if not directory.is_started and holds_only_a_start(directory.checkpoints):
        return None
    return RunMetadata.from_json(newest_metadata(directory.checkpoints), directory.path)


def _describe(config: Config, trainer: Trainer, dataset: Dataset) -> RunMetadata:
    """The metadata of a run before its first step."""
    return RunMetadata(
        config=config,
        device_count=trainer.mesh.size,
        image_shape=dataset.image_shape,
        class_names=dataset.class_names,
        data_sha256=dataset.sha256,
        steps_per_epoch=trainer.steps_per_epoch,
        preprocess=trainer.task.preprocess,
        class_weights=trainer.task.loss.class_weights,
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
    progress = Progress(step, state, saved.epoch_metrics, saved.epoch_seconds, saved.epoch_input_wait_seconds)
    return progress, list(saved.history)
