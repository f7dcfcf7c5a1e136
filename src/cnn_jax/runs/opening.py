"""Opening a run, new or to be continued, so that it is ready to be trained."""

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, background
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import expanded
from cnn_jax.formats.weights import Weights
from cnn_jax.runs.checkpoint import holds_only_a_start, newest_metadata, restore
from cnn_jax.runs.checks import check_dataset, check_same, check_same_in_all, check_usable
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.pretrained import is_published, open_pretrained
from cnn_jax.runs.processes import Processes
from cnn_jax.runs.recorder import Recorder
from cnn_jax.runs.run import load_config
from cnn_jax.runs.workdir import Workdir, make_default_workdir
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import Progress, Trainer, create_task_for
from cnn_jax.training.sharding import make_mesh, replicate
from cnn_jax.training.state import TrainState

logger = logging.getLogger("cnn_jax")


class Training(NamedTuple):
    """A run that is ready to be trained.

    Attributes:
        directory: the run directory, which is locked.
        trainer: trains the run.
        dataset: the examples.
        metadata: the metadata of the run where it starts.
        start: the progress from which it starts.
        processes: the processes that train it together; the first one holds the lock.
        resume_command: how to continue it on the command line.
    """

    directory: Workdir
    trainer: Trainer
    dataset: Dataset
    metadata: RunMetadata
    start: Progress
    processes: Processes
    resume_command: str

    def recorder(self, **options: Any) -> Recorder:
        """Create what writes the files of the run in the first process; the options are those of ``Recorder``."""
        is_writer = self.processes.is_first
        return Recorder(self.directory, self.trainer, self.dataset, self.metadata, is_writer=is_writer, **options)


@contextlib.contextmanager
def starting(
    config: Config,
    workdir: str | Path | None = None,
    *,
    dataset: Dataset | None = None,
    devices: Sequence[jax.Device] | None = None,
    data_of: Training | None = None,
) -> Iterator[Training]:
    """Yield a new run that is ready to be trained, and hold the lock of its directory.

    Args:
        config: the settings.
        workdir: the run directory; by default ``runs/<dataset>-<model>-<time>``.
        dataset: the examples; by default the dataset that ``config`` names.
        devices: the devices to train on; by default all devices of all processes.
        data_of: a run with the same ``DataConfig``, whose dataset is used instead.
    """
    processes = Processes(make_mesh(devices))
    with processes.reporting_loss(), contextlib.ExitStack() as stack:
        processes.check_same("arguments", "fit")
        directory = None if workdir is None else Workdir(Path(workdir))
        with processes.together():
            check_usable(config)
            config = with_absolute_paths(config)
            weights = _open_weights(config)
            if directory is not None and processes.is_first:
                directory.check_unused()
            config, dataset = _resolve(config, dataset, data_of)
            check_dataset(config, dataset)
            trainer = _create_trainer(config, dataset, devices, weights or _same_preprocess(config, data_of))
            start = _start(trainer, config, dataset, weights)
            metadata = _describe(config, trainer, dataset, processes, data_of)
        check_same_in_all(processes, metadata, start)

        def create() -> Workdir:
            created = directory or Workdir(make_default_workdir(config))
            created.create()
            stack.enter_context(created.locked())
            created.check_unused()  # again: another process may have created it
            return created

        directory = processes.from_first(create)
        yield Training(directory, trainer, dataset, metadata, start, processes, _resume_command(directory, processes))


@contextlib.contextmanager
def resuming(
    workdir: str | Path,
    *,
    dataset: Dataset | str | None = None,
    devices: Sequence[jax.Device] | None = None,
    data_of: Training | None = None,
    **changes: Any,
) -> Iterator[Training]:
    """Yield a run that is ready to be continued, and hold the lock of its directory.

    Args:
        workdir: the run directory.
        dataset: the examples the run was trained on, or the name of their dataset as in the config; by default the
            dataset that the config names.
        devices: the devices to train on, which may be others than before; by default all devices of all processes.
        data_of: as in ``starting``.
        **changes: new values of settings, of those that a resumed run may change.
    """
    directory = Workdir(Path(workdir))
    if isinstance(dataset, str):
        changes, dataset = changes | {"dataset": dataset}, None
    processes = Processes(make_mesh(devices))
    with processes.reporting_loss(), contextlib.ExitStack() as stack:
        processes.check_same("arguments", "resume")
        written = processes.from_first(lambda: load_config(directory.path))
        with processes.together():
            config = with_absolute_paths(dataclasses.replace(written, **changes))
            check_usable(config)
        saved = processes.from_first(lambda: _saved_metadata(directory))
        trained = written if saved is None else saved.config
        with processes.together():
            if dataset is None and config.dataset != "auto":  # before the data is read, which may take long
                check_same(config, trained, directory)
            config, dataset = _resolve(config, dataset, data_of)
            check_same(config, trained, directory)
            check_dataset(config, dataset)
            weights = _open_weights(config) if saved is None else None
            trainer = _create_trainer(config, dataset, devices, saved or weights)
            start = _start(trainer, config, dataset, weights) if saved is None else None
            metadata = _describe(config, trainer, dataset, processes, data_of)
        check_same_in_all(processes, metadata, start)

        def restore_progress() -> tuple[Progress | None, list[EpochRecord]]:
            directory.create()
            stack.enter_context(directory.locked())
            return (None, []) if saved is None else _restore(trainer, directory, metadata)

        restored, history = processes.from_first(restore_progress)
        if start is None:
            start, metadata = restored, metadata.at(history, restored)
        if start.step > config.epochs * trainer.steps_per_epoch:
            epoch = -(-start.step // trainer.steps_per_epoch)
            raise UsageError(f"{directory.path} was trained for longer: --epochs must be at least {epoch}")
        yield Training(directory, trainer, dataset, metadata, start, processes, _resume_command(directory, processes))


def _resume_command(directory: Workdir, processes: Processes) -> str:
    flags = "--distributed --resume" if processes.count > 1 else "--resume"
    return f"python -m cnn_jax.train {flags} --workdir {shlex.quote(str(directory.path.absolute()))}"


def _resolve(config: Config, dataset: Dataset | None, data_of: Training | None) -> tuple[Config, Dataset]:
    """Load the dataset if none is given, and put its name into the config."""
    if data_of is not None:
        dataset = data_of.dataset
    elif dataset is None:
        dataset = data.load(config)
    else:
        dataset = data.with_validation(dataset, config.validation_fraction, config.split_seed)
    return dataclasses.replace(config, dataset=dataset.name), dataset


def with_absolute_paths(config: Config) -> Config:
    """The same settings for any working directory."""
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


def _create_trainer(
    config: Config, dataset: Dataset, devices: Sequence[jax.Device] | None, source: RunMetadata | Weights | None
) -> Trainer:
    """Create a trainer with the preprocessing of ``source``, the run to resume or pretrained weights, if known."""
    preprocess = source.preprocess if source is not None and config.normalize else None
    return Trainer(config, dataset, devices, create_task_for(config, dataset, preprocess))


def _same_preprocess(config: Config, data_of: Training | None) -> RunMetadata | None:
    """The run whose preprocessing, which its dataset determines, is also that of a new run; None if there is none."""
    if data_of is None:
        return None
    before = data_of.metadata.config
    return data_of.metadata if before.normalize and config.normalize and before.init_from is None else None


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


def _describe(
    config: Config, trainer: Trainer, dataset: Dataset, processes: Processes, data_of: Training | None
) -> RunMetadata:
    """The metadata of a run before its first step."""
    same = None if data_of is None else data_of.metadata
    return RunMetadata(
        config=config,
        process_count=processes.count,
        device_count=trainer.mesh.size,
        image_shape=dataset.image_shape,
        class_names=dataset.class_names,
        data_sha256=same.data_sha256 if same else dataset.sha256,
        steps_per_epoch=trainer.steps_per_epoch,
        preprocess=trainer.task.preprocess,
        class_weights=trainer.task.loss.class_weights,
        dark_background=same.dark_background if same else background.is_dark(dataset.train.images),
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
    if saved.hardware != now.hardware:
        logger.warning(
            "%s was trained on %s and is resumed on %s: results agree up to rounding, but not bitwise",
            directory.path,
            saved.hardware,
            now.hardware,
        )
    progress = Progress(step, state, saved.epoch_metrics, saved.epoch_seconds, saved.epoch_input_wait_seconds)
    return progress, list(saved.history)
