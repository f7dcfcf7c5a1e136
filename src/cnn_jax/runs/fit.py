"""Training from a config to a run directory: ``fit``, ``resume``, and ``train``, of which both are made."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.data.store import ChangedImageError
from cnn_jax.errors import CnnJaxError
from cnn_jax.runs.opening import Training, resuming, starting
from cnn_jax.runs.run import Run
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import ChunkReport, Progress


class StoppedError(CnnJaxError):
    """Training was stopped on request, after saving a checkpoint."""

    def __init__(self, resume_command: str, step: int | None = None):
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped{after}: continue with {resume_command}")


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

    After ``jax.distributed.initialize``, all processes call this with the same arguments. The first one writes.

    Args:
        config: the settings.
        workdir: the run directory; by default ``runs/<dataset>-<model>-<time>``.
        dataset: the examples; by default the dataset that ``config`` names.
        devices: the devices to train on; by default all devices of all processes.
        report: whether to write the plots and ``report.html`` at the end.
        on_epoch: called with the record of each epoch, in the first process; ``print`` prints the same lines as the
            command.
        on_chunk: called with the progress of the epoch after each chunk of at most 100 steps, in the first process.
        stop_requested: called before each chunk and between the files of the report; if it returns True, training
            saves a checkpoint and stops. With several processes, one of them is enough, and all stop after the same
            step, a chunk later.

    Returns:
        The trained network.

    Raises:
        UsageError: a setting or the data cannot be used or differs between processes, or the run directory is not
            empty.
        CnnJaxError: the data cannot be downloaded, a file cannot be written, or the loss is not finite.
        LostProcessError: another process ended.
        StoppedError: a stop was requested.
    """
    with starting(config, workdir, dataset=dataset, devices=devices) as training:
        return train(training, report=report, on_epoch=on_epoch, on_chunk=on_chunk, stop_requested=stop_requested)


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
        UsageError: not a run directory, or settings or data differ from the run's or between processes.
        CnnJaxError: as in ``fit``, or all checkpoints are damaged.
        LostProcessError: another process ended.
        StoppedError: a stop was requested.
    """
    with resuming(workdir, dataset=dataset, devices=devices, **changes) as training:
        return train(training, report=report, on_epoch=on_epoch, on_chunk=on_chunk, stop_requested=stop_requested)


def train(
    training: Training,
    *,
    report: bool = True,
    verbose: bool = True,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Run:
    """Train from the start or the newest checkpoint to the end; the first process writes the run directory.

    Args:
        training: what ``starting`` or ``resuming`` yields.
        report: as in ``fit``.
        verbose: whether to log what is trained, and warn if the network learns nothing.
        on_epoch: as in ``fit``.
        on_chunk: as in ``fit``.
        stop_requested: as in ``fit``.

    Raises:
        CnnJaxError: a file cannot be written, or the loss is not finite.
        StoppedError: a stop was requested.
    """
    trainer, progress, processes = training.trainer, training.start, training.processes
    stop_requested = processes.requested_in_any(stop_requested)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(training.recorder(verbose=verbose, on_epoch=on_epoch))

        def stop_if_requested(progress: Progress) -> None:
            if stop_requested():
                recorder.save(progress)
                raise StoppedError(training.resume_command, progress.step)

        before_last_chunk: Progress | None = None

        def before_chunk(progress: Progress) -> None:
            nonlocal before_last_chunk
            before_last_chunk = progress
            stop_if_requested(progress)
            if recorder.is_due(progress.step):
                recorder.save(progress)

        def save_before_chunk() -> None:
            """Save the progress before the chunk whose images could not be read, not before one that was taken."""
            if before_last_chunk and not any(leaf.is_deleted() for leaf in jax.tree.leaves(before_last_chunk.state)):
                recorder.save(before_last_chunk)

        stack.enter_context(_when_images_change(save_before_chunk, training))
        recorder.start(progress)
        compile_seconds = trainer.compile()
        listeners = {"on_chunk": on_chunk} if processes.is_first else {}
        epochs = trainer.epochs(progress, before_chunk=before_chunk, **listeners)
        for record, progress in () if recorder.is_finished else epochs:
            before_last_chunk = None
            recorder.end_epoch(record, progress)
            if recorder.is_finished:
                break
        return recorder.finish(
            progress.state,
            compile_seconds=compile_seconds,
            report=report,
            before_file=lambda: stop_if_requested(progress),
        )


@contextlib.contextmanager
def _when_images_change(save: Callable[[], None], training: Training) -> Iterator[None]:
    """Save the progress if an image that is decoded whenever it is used has changed, and say how to continue."""
    try:
        yield
    except ChangedImageError as error:
        save()
        raise ChangedImageError(f"{error}, then continue with {training.resume_command}") from None
