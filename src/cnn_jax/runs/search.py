"""Searching for the best settings with Optuna (Akiba et al., 2019, https://arxiv.org/abs/1907.10902).

The members of a search are called trials. Optuna's journal in the directory of the sweep has their settings and
results, so any number of processes can take part, and Optuna's tools can read it. A trial whose process was killed is
continued from its checkpoint: nobody holds the lock of its run directory.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from cnn_jax.config import Config
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.report import search as report
from cnn_jax.report.sweep import Result
from cnn_jax.runs.checks import check_usable
from cnn_jax.runs.fit import StoppedError, train
from cnn_jax.runs.opening import Training
from cnn_jax.runs.space import Space
from cnn_jax.runs.sweep import check_with_data, create_directory, open_member, with_portable_paths
from cnn_jax.runs.sweep_directory import SweepDirectory
from cnn_jax.settings import Range
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import NonFiniteError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "journal.log"
"""The name of the file with the trials."""

STUDY = "cnn_jax"
"""The name of the study in the journal."""


class PrunedError(CnnJaxError):
    """A trial was ended because others were better after the same number of epochs."""

    def __init__(self, record: EpochRecord):
        super().__init__(
            f"stopped after epoch {record.epoch}: its validation accuracy {record.validation_accuracy:.4f} was below "
            "the median"
        )


def create_search(
    config: Config, varied: Mapping[str, Sequence[Any] | Range], trials: int, workdir: str | Path | None
) -> SweepDirectory:
    """Create the directory of a new search.

    Args:
        config: the settings of all members, but for those that vary.
        varied: the values to choose from of each setting that varies, or their range, by its name.
        trials: the number of members.
        workdir: the directory; by default ``runs/sweep-<dataset>-<model>-<time>``.

    Raises:
        UsageError: Optuna is not installed, a setting cannot be used, there is no validation split, or the directory is
            not empty.
        CnnJaxError: the data cannot be downloaded.
    """
    check_installed()
    space = Space(with_portable_paths(config), varied, trials)
    for corner in space.corners():
        check_usable(corner)
    check_with_data(space.corners(), needs_validation=True)
    return create_directory(space, workdir)


def check_installed() -> None:
    """Raise UsageError unless Optuna can be imported."""
    try:
        import optuna
    except ImportError:
        raise UsageError("--search needs Optuna: pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def train_search(
    directory: SweepDirectory,
    *,
    seed: int | None = None,
    dataset: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    on_result: Callable[[Result], None] = lambda result: None,
    stop_requested: Callable[[], bool] = lambda: False,
    **changes: Any,
) -> list[Result]:
    """Train the trials of a search that are not done and that no other process is training.

    Settings are sampled by a tree-structured Parzen estimator, and trials are ended early by the median rule.

    Args:
        directory: the directory of the search.
        seed: determines the settings that are sampled, if the data and hardware are the same and no other process takes
            part; processes that do must have other seeds.
        dataset: the name of the dataset, if it is a folder that has moved.
        devices: as in ``train_sweep``.
        on_epoch: as in ``train_sweep``.
        on_result: as in ``train_sweep``.
        stop_requested: as in ``train_sweep``.
        **changes: as in ``train_sweep``.

    Returns:
        The results of all trials that have begun.

    Raises:
        UsageError, CnnJaxError, StoppedError: as in ``train_sweep``.
    """
    check_installed()
    devices = jax.local_devices() if devices is None else devices
    space, study, data_of = directory.plan(), open_study(directory, seed), None
    options = {"on_epoch": on_epoch, "stop_requested": stop_requested}
    while True:
        if data_of is not None and stop_requested():
            raise StoppedError(directory.resume_command)
        with contextlib.ExitStack() as stack:
            opened = _open_next(
                stack, study, directory, space, dataset=dataset, devices=devices, data_of=data_of, **changes
            )
            if opened is None:
                return directory.results()
            trial, training = opened
            name = training.directory.path.name
            data_of = training
            try:
                _train(training, trial, **options)
            except (PrunedError, NonFiniteError) as error:
                directory.end(name, error, is_pruned=isinstance(error, PrunedError))
            result = directory.result(name, training.metadata.config)
            _tell(study, trial.number, result)
            on_result(result)


def open_study(directory: SweepDirectory, seed: int | None = None) -> "optuna.Study":
    """Open the study of a search, which is created if it does not exist; ``seed`` is that of ``train_search``."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = directory.path / JOURNAL
    _remove_partial_line(journal)
    try:
        return optuna.create_study(
            study_name=STUDY,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(),
        )
    except (ValueError, KeyError, TypeError):
        raise CnnJaxError(f"{journal} is damaged: start a new search") from None


def _remove_partial_line(journal: Path) -> None:
    """Remove the end of the journal if it was not written completely, as after a power failure.

    Optuna would append to it.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not journal.exists():
        return
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        content = journal.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def pictures(directory: SweepDirectory) -> dict[str, Callable[[Path], None]]:
    """The functions that write the pictures of a search, by the names of their files, as far as there are results."""
    study = open_study(directory)
    return {
        name: partial(save, study)
        for name, save in {
            "importances.png": report.save_importances,
            "parallel_coordinates.png": report.save_parallel_coordinates,
        }.items()
        if report.has_results(study)
    }


def _open_next(
    stack: contextlib.ExitStack, study: "optuna.Study", directory: SweepDirectory, space: Space, **options: Any
) -> tuple["Trial | FrozenTrial", Training] | None:
    """Open a trial whose process was killed, or a new one; None if the others are done or being trained."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        training = open_member(stack, directory, _member(space, trial), **options)
        if training is not None:
            return trial, training
        member = _member(space, trial)
        if (result := directory.result(member.name, member.config)).is_done:  # ended before the study was told
            _tell(study, trial.number, result)
    while (trial := _ask(study, directory, space)) is not None:
        training = open_member(stack, directory, _member(space, trial), **options)
        if training is not None:
            return trial, training
    return None


def _ask(study: "optuna.Study", directory: SweepDirectory, space: Space) -> "Trial | None":
    """Begin a trial; None if all have begun."""
    with directory.exclusively():  # or processes that ask at the same time might begin one too many
        return study.ask(space.distributions()) if _num_begun(study) < space.num_members else None


def _tell(study: "optuna.Study", number: int, result: Result) -> None:
    """Tell the study the result of a trial that is done."""
    from optuna.trial import TrialState

    if result.summary is not None:
        study.tell(number, result.summary["validation_accuracy"], skip_if_finished=True)
    else:
        state = TrialState.PRUNED if result.is_pruned else TrialState.FAIL
        study.tell(number, state=state, skip_if_finished=True)


def _num_begun(study: "optuna.Study") -> int:
    """The number of trials without those that are enqueued."""
    from optuna.trial import TrialState

    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def _member(space: Space, trial: "Trial | FrozenTrial") -> Result:
    return Result(f"trial-{trial.number:04}", dataclasses.replace(space.config, **trial.params))


def _train(
    training: Training,
    trial: "Trial | FrozenTrial",
    on_epoch: Callable[[EpochRecord], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Train a trial to the end.

    A trial whose process was killed is not ended early: Optuna has no way to report to it.

    Raises:
        PrunedError: the trial was ended early.
        NonFiniteError: the loss is not finite.
        StoppedError: a stop was requested.
    """
    from optuna.trial import Trial

    pruned_at = None

    def report_epoch(record: EpochRecord) -> None:
        nonlocal pruned_at
        on_epoch(record)
        if isinstance(trial, Trial) and record.epoch < training.metadata.config.epochs - 1:
            trial.report(record.validation_accuracy, record.epoch)
            pruned_at = record if trial.should_prune() else None

    try:
        train(
            training,
            report=False,
            verbose=False,
            on_epoch=report_epoch,
            stop_requested=lambda: pruned_at is not None or stop_requested(),
        )
    except StoppedError:
        if pruned_at is None:
            raise
        raise PrunedError(pruned_at) from None
