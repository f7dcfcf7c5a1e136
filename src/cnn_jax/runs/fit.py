"""Training from beginning to end: a config in, a run directory out."""

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.training.train_state import TrainState

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, background
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.files import expanded
from cnn_jax.runs.metadata import FORMAT, Meta, check_meta, config_of, history_of
from cnn_jax.report import page, plots, tensorboard
from cnn_jax.runs.run import Run, load_config, make_run
from cnn_jax.runs.checkpoint import CheckpointWriter, holds_only_a_start, newest_meta, restore
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import ChunkReport, Progress, Trainer
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.sharding import replicate
from cnn_jax.runs.workdir import CONFIG, Workdir

DETERMINISTIC_OPS = "--xla_gpu_deterministic_ops=true"
"""In the environment's ``XLA_FLAGS``, makes XLA take only operations that give the same bits each time on a GPU."""

MAY_CHANGE = {"epochs", "target_accuracy", "data_dir", "checkpoint_every", "tensorboard"}
"""Settings that may differ when a run goes on: when to stop, what to save, where data lie; not what is computed."""

logger = logging.getLogger("cnn_jax")


class StoppedError(CnnJaxError):
    """Training was asked to stop, and has saved how far it came."""

    def __init__(self, workdir: Path, step: int):
        resume = f"python -m cnn_jax.train --resume --workdir {shlex.quote(str(workdir))}"
        super().__init__(f"stopped after step {step}: continue with {resume}")


def fit(
    config: Config,
    workdir: str | Path | None = None,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Run:
    """Train a network, or go on training it, and leave all that comes of it in its run directory.

    Args:
        config: the settings.
        workdir: the run directory; by default ``runs/<dataset>-<model>-<time>``.
        resume: go on from the newest checkpoint in ``workdir``, to the same parameters, bit for bit, that a run
            never interrupted would have.
        on_epoch: told of each epoch; ``print`` prints the lines of the command.
        on_chunk: told how far the epoch has come, after each chunk of at most a hundred steps.
        stop_requested: asked before each chunk and while the report is made; when it says so, training stops, once a
            checkpoint is written.

    Raises:
        UsageError: the config cannot be used, or the run directory does not fit it.
        CnnJaxError: the data could not be fetched, a checkpoint not be written, or the numbers broke.
        StoppedError: a stop was requested.
    """
    if config.deterministic and jax.default_backend() == "gpu" and DETERMINISTIC_OPS not in os.getenv("XLA_FLAGS", ""):
        raise UsageError(f"deterministic on a GPU needs XLA_FLAGS={DETERMINISTIC_OPS} set before jax looks for devices")
    if config.tensorboard:
        tensorboard.check_installed()
    if resume and workdir is None:
        raise UsageError("resume needs workdir, the run directory to continue in")
    if workdir is not None and not resume:
        Workdir(Path(workdir)).check_unused()
    dataset = data.load(config)
    config = dataclasses.replace(config, dataset=dataset.name)
    for name in ("data_dir", "init_from"):
        if (given := getattr(config, name)) is not None:
            config = dataclasses.replace(config, **{name: str(expanded(given).absolute())})
    directory = None if workdir is None else Workdir(Path(workdir))
    saved = _saved_meta(directory) if resume else None
    if resume:
        _check_same(config, directory, saved)
    trainer = Trainer(config, dataset)
    begun = None if saved else _begin(trainer, config, dataset)
    directory = directory or Workdir(_make_default_workdir(config))
    directory.create()
    with directory.locked():
        if not resume:
            directory.check_unused()  # again: another process may have been quicker
        described = _describe_training(config, trainer, dataset)
        start, history = _saved(trainer, directory, described) if saved else (begun, [])
        if start.step > config.epochs * trainer.steps_per_epoch:
            epoch = -(-start.step // trainer.steps_per_epoch)
            raise UsageError(f"{directory.path} is already in epoch {epoch}: --epochs must be at least {epoch}")
        # First of all, so that whatever follows can be resumed.
        directory.write_config(config)
        with CheckpointWriter(directory.checkpoints) as checkpoints, contextlib.ExitStack() as stack:

            def save(progress: Progress, **score: float) -> None:
                trainer.check_finite(progress.metrics)
                checkpoints.save(progress.state, described | _describe_progress(history, progress), **score)

            def before_chunk(progress: Progress) -> None:
                if stop_requested():
                    save(progress)
                    raise StoppedError(directory.path.absolute(), progress.step)
                if config.checkpoint_every and progress.step % config.checkpoint_every == 0 and progress.step > 0:
                    save(progress)

            save(start)
            checkpoints.wait()
            directory.write_history(history)
            event_files = None
            if config.tensorboard:
                event_files = tensorboard.EventFiles(directory.path / "tensorboard", history, trainer.steps_per_epoch)
                stack.enter_context(event_files)
            compile_seconds = trainer.compile()
            progress = start
            epochs = trainer.epochs(start, on_chunk=on_chunk, before_chunk=before_chunk)
            for record, progress in () if reached_target(config, history) else epochs:
                history.append(record)
                save(progress, test_accuracy=record.test_accuracy)
                directory.append_history(record)
                if event_files is not None:
                    event_files.append(record)
                on_epoch(record)
                if reached_target(config, history):
                    break

        def stop_if_requested() -> None:
            if stop_requested():
                raise StoppedError(directory.path.absolute(), progress.step)

        stop_if_requested()
        summary = directory.write_summary(config, history, compile_seconds, device_count=trainer.mesh.size)
        _, logits = trainer.evaluate(progress.state.params)
        for write in _report_writers(
            directory, config, history, trainer.steps_per_epoch, dataset, np.asarray(logits), summary
        ):
            stop_if_requested()
            write()
        stop_if_requested()
    state = jax.device_put(progress.state, jax.devices()[0])  # on one device, as load_run gives it
    return make_run(directory, config, described, history, state)


def _report_writers(
    directory: Workdir,
    config: Config,
    history: Sequence[EpochRecord],
    steps_per_epoch: int,
    dataset: Dataset,
    logits: np.ndarray,
    summary: Mapping[str, Any],
) -> Iterable[Callable[[], None]]:
    """What writes each file of the report on a run whose network gives the test examples these logits."""

    def write_curves() -> None:
        with directory.replacing("curves.png") as path:
            plots.save_curves(path, history, steps_per_epoch)

    def write_confusion() -> None:
        with directory.replacing("confusion.png") as path:
            plots.save_confusion(path, dataset.test.labels, np.argmax(logits, axis=-1), dataset.class_names)

    def write_page() -> None:
        with directory.replacing("report.html") as path:
            page.save_page(
                path,
                config=config,
                history=history,
                steps_per_epoch=steps_per_epoch,
                dataset=dataset,
                logits=logits,
                summary=summary,
            )

    return write_curves, write_confusion, write_page


def reached_target(config: Config, history: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch has the test accuracy asked for; false where none is asked for."""
    return bool(history) and config.target_accuracy is not None and history[-1].test_accuracy >= config.target_accuracy


def _make_default_workdir(config: Config) -> Path:
    dataset = f"folder-{Path(config.dataset).name}"[:100] if config.dataset.startswith("folder:") else config.dataset
    name = re.sub(r"[^\w.-]+", "-", f"{dataset}-{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # runs started within a second have one name
            path.mkdir(parents=True)
            return path


def _begin(trainer: Trainer, config: Config, dataset: Dataset) -> Progress:
    """The beginning of training, with the weights of ``config.init_from`` where there are such."""
    start = trainer.start()
    if config.init_from is None:
        return start
    from cnn_jax.formats.weights import read_params

    params = read_params(Path(config.init_from), start.state.params, dataset.image_shape)
    return dataclasses.replace(start, state=start.state.replace(params=replicate(params, trainer.mesh)))


def _saved_meta(directory: Workdir) -> Meta | None:
    """What the newest checkpoint holds besides the state; None if the run was stopped before its first checkpoint."""
    directory.check_holds_run()
    if not directory.is_started and holds_only_a_start(directory.checkpoints):
        return None
    return newest_meta(directory.checkpoints)


def _check_same(config: Config, directory: Workdir, saved: Meta | None) -> None:
    """Raise UsageError if settings differ from those of the run that may not change.

    The checkpoint's settings count, because they are those that the state was trained with, whatever has become of
    ``config.yaml``.
    """
    before = load_config(directory.path) if saved is None else config_of(saved, directory.path)
    before, now = (dataclasses.asdict(c) for c in (before, config))
    different = [name for name in now if now[name] != before[name] and name not in MAY_CHANGE]
    if different:
        differences = ", ".join(f"{name} was {before[name]} and is now {now[name]}" for name in different)
        raise UsageError(
            f"the run in {directory.path} was trained with other settings: {differences}; use the same settings (also "
            f"in {CONFIG}), or choose another --workdir"
        )


def _describe_training(config: Config, trainer: Trainer, dataset: Dataset) -> Meta:
    """What every checkpoint holds besides the state."""
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "device_count": trainer.mesh.size,
        "image_shape": dataset.image_shape,
        "class_names": dataset.class_names,
        "data_sha256": dataset.sha256,
        "dark_background": background.is_dark(dataset.train.images),
    }


def _describe_progress(history: Sequence[EpochRecord], progress: Progress) -> Meta:
    """What a checkpoint holds besides that."""
    return {
        "history": [record.to_json() for record in history],
        "epoch": {"seconds": progress.seconds, "metrics": progress.metrics.to_numbers()},
    }


def _saved(trainer: Trainer, directory: Workdir, described: Meta) -> tuple[Progress, list[EpochRecord]]:
    """Where the newest checkpoint stands, and the epochs before."""

    def like(meta: Meta) -> TrainState:
        check_meta(meta, directory.path)
        if meta["data_sha256"] != described["data_sha256"]:
            raise UsageError(
                f"the dataset changed since the run in {directory.path} was trained: restore its images and classes, "
                "or train in another --workdir"
            )
        return trainer.abstract_state

    state, meta = restore(directory.checkpoints, like)
    step, epoch, history = int(state.step), meta["epoch"], history_of(meta)
    ends = [((number + 1) * trainer.steps_per_epoch, number) for number in range(len(history))]
    if len(history) != step // trainer.steps_per_epoch or [(end.step, end.epoch) for end in history] != ends:
        raise CnnJaxError(
            f"the run in {directory.path} came to step {step} by other epochs than of {trainer.steps_per_epoch} steps: "
            "go on with the data set it was made with"
        )
    if meta["device_count"] != trainer.mesh.size:
        logger.warning(
            "%s was trained on %d device(s) and goes on with %d: the same up to rounding, but not to the last bit",
            directory.path,
            meta["device_count"],
            trainer.mesh.size,
        )
    return Progress(step, state, Metrics.from_numbers(epoch["metrics"]), epoch["seconds"]), history
