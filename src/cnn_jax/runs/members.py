"""Runs that are trained as one program, each with a run directory of its own."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cnn_jax.runs.fit import StoppedError
from cnn_jax.runs.opening import Training
from cnn_jax.runs.recorder import Recorder
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.loop import NonFiniteError, Progress
from cnn_jax.training.members import MembersTrainer


@dataclass
class _Member:
    training: Training
    recorder: Recorder
    progress: Progress
    is_running: bool = True

    def end_epoch(self, progress: Progress) -> None:
        trainer = self.training.trainer
        trainer.check_finite(progress.metrics)
        record, self.progress = trainer.end_epoch(progress)
        self.recorder.end_epoch(record, self.progress)


def train_members(
    trainings: Sequence[Training],
    *,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Training, NonFiniteError | None]]:
    """Train runs as one program; see ``cnn_jax.training.members``.

    Args:
        trainings: what ``starting`` or ``resuming`` yield, all at the same step. Their settings differ in the seed and
            the learning rate only, and their number is a multiple of that of the devices.
        on_epoch: called with the record of each epoch of each run.
        stop_requested: called before each chunk of steps; if it returns True, all runs are saved and training stops.

    Yields:
        Each run as soon as it has ended, and the error if its loss is not finite, which does not stop the others.

    Raises:
        CnnJaxError: a file cannot be written.
        StoppedError: a stop was requested.
    """
    with contextlib.ExitStack() as stack:
        members = []
        for training in trainings:
            recorder = stack.enter_context(training.recorder(verbose=False, on_epoch=on_epoch))
            recorder.start(training.start)
            members.append(_Member(training, recorder, training.start))
        trainer = MembersTrainer([training.trainer for training in trainings])
        compile_seconds = trainer.compile([training.start for training in trainings]) / len(trainings)

        def before_chunk(step: int, copy_progress: Callable[[], list[Progress]]) -> None:
            is_stop = stop_requested()
            if is_stop or members[0].recorder.is_due(step):
                for member, progress in zip(members, copy_progress(), strict=True):
                    if member.is_running:
                        with contextlib.suppress(NonFiniteError):  # reported at the end of the epoch
                            member.recorder.save(progress)
            if is_stop:
                raise StoppedError(trainings[0].resume_command, step)

        def finish(member: _Member) -> tuple[Training, None]:
            member.is_running = False
            member.recorder.finish(member.progress.state, compile_seconds=compile_seconds, report=False)
            return member.training, None

        for member in members:
            if member.recorder.is_finished:
                yield finish(member)
        is_running = any(member.is_running for member in members)
        epochs = trainer.epochs([training.start for training in trainings], before_chunk=before_chunk)
        for ends in epochs if is_running else ():
            for member, progress in zip(members, ends, strict=True):
                if not member.is_running:
                    continue
                try:
                    member.end_epoch(progress)
                except NonFiniteError as error:
                    member.is_running = False
                    yield member.training, error
                else:
                    if member.recorder.is_finished:
                        yield finish(member)
            if not any(member.is_running for member in members):
                break
        for member in members:
            if member.is_running:
                yield finish(member)
