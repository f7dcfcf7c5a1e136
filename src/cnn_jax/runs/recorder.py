"""Writing the files of a run while it is trained."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Self

import jax

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.report import tensorboard
from cnn_jax.runs.checkpoint import CheckpointWriter
from cnn_jax.runs.metadata import RunMetadata
from cnn_jax.runs.outputs import MIN_STEPS, first_line, report_files, warn_if_constant, warn_if_untrained
from cnn_jax.runs.run import Run, count_parameters
from cnn_jax.runs.summary import summarize
from cnn_jax.runs.workdir import Workdir
from cnn_jax.training.history import EpochRecord, ran_out_of_patience, reached_target
from cnn_jax.training.loop import Progress, Trainer
from cnn_jax.training.metrics import CrossEntropy
from cnn_jax.training.state import TrainState

logger = logging.getLogger("cnn_jax")


class Recorder:
    """Writes the checkpoints, metrics and report of a run.

    A context manager: leaving it waits until the last checkpoint is written.

    Args:
        directory: the run directory, which exists and is locked.
        trainer: trains the run.
        dataset: the examples.
        metadata: the metadata of the run where it starts.
        is_writer: whether to write at all; of several processes that train together, only the first one does.
        verbose: whether to log what is trained, and warn if the network learns nothing.
        on_epoch: called with the record of each epoch, once it is written.

    Attributes:
        config: the settings.
        history: a record for each finished epoch.
    """

    def __init__(
        self,
        directory: Workdir,
        trainer: Trainer,
        dataset: Dataset,
        metadata: RunMetadata,
        *,
        is_writer: bool = True,
        verbose: bool = True,
        on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    ):
        self.config: Config = metadata.config
        self.history = list(metadata.history)
        self._directory = directory
        self._trainer = trainer
        self._dataset = dataset
        self._metadata = metadata
        self._is_writer = is_writer
        self._verbose = verbose
        self._on_epoch = on_epoch
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._checkpoints = None
        if self._is_writer:
            self._directory.write_config(self.config)  # first, so that the run can be resumed from here on
            self._checkpoints = self._stack.enter_context(CheckpointWriter(self._directory.checkpoints))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def start(self, progress: Progress) -> None:
        """Save the first checkpoint, and write the finished epochs."""
        self.save(progress)
        self._on_record: list[Callable[[EpochRecord], None]] = []
        if self._checkpoints is None:
            return
        self._checkpoints.wait()
        if self._verbose:
            logger.info(first_line(self._trainer, self._dataset, self.config.model))
        self._directory.write_history(self.history)
        self._on_record.append(self._directory.append_history)
        if self.config.tensorboard:
            steps_per_epoch = self._trainer.steps_per_epoch
            events = tensorboard.EventFiles(self._directory.path / "tensorboard", self.history, steps_per_epoch)
            self._on_record.append(self._stack.enter_context(events).append)
        self._on_record.append(self._on_epoch)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved at a step within an epoch."""
        every = self.config.checkpoint_every
        return every is not None and step > 0 and step % every == 0

    def save(self, progress: Progress, accuracy: float | None = None) -> None:
        """Save a checkpoint; see ``CheckpointWriter.save``.

        Raises:
            NonFiniteError: the progress is not finite.
        """
        self._trainer.check_finite(progress.metrics)
        if self._checkpoints is not None:
            self._checkpoints.save(progress.state, self._metadata.at(self.history, progress).to_json(), accuracy)

    def end_epoch(self, record: EpochRecord, progress: Progress) -> None:
        """Save a checkpoint at the end of an epoch, and write its record."""
        self.history.append(record)
        self.save(progress, record.selection_accuracy)
        for call in self._on_record:
            call(record)
        is_time = record.step >= MIN_STEPS > record.step - self._trainer.steps_per_epoch
        task = self._trainer.task
        if self._verbose and is_time and task.loss == CrossEntropy() and not task.augment.mixes:
            warn_if_untrained(record, self._trainer.steps_per_epoch, len(self._dataset.class_names))

    @property
    def is_finished(self) -> bool:
        """Whether training ends before the last epoch."""
        return reached_target(self.config, self.history) or ran_out_of_patience(self.config, self.history)

    def finish(
        self,
        state: TrainState,
        *,
        compile_seconds: float,
        report: bool,
        before_file: Callable[[], None] = lambda: None,
    ) -> Run:
        """Score the final state on the test split, and write the summary and the report.

        Args:
            state: the state after the last step.
            compile_seconds: the time that compilation took.
            report: whether to write the plots and ``report.html``.
            before_file: called before and after each file of the report.
        """
        before_file()
        score, logits = self._trainer.evaluate(state, "test")
        if self._verbose and self.history[-1].step >= MIN_STEPS:
            warn_if_constant(logits, self._dataset)
        summary = summarize(
            self.config,
            self.history,
            self._dataset,
            num_parameters=count_parameters(state.params),
            test_score=score,
            compile_seconds=compile_seconds,
            devices=self._trainer.mesh.devices.ravel().tolist(),
        )
        if self._is_writer:
            self._directory.write_summary(summary)
        steps_per_epoch = self._trainer.steps_per_epoch
        files = report_files(self.config, self.history, steps_per_epoch, self._dataset, logits, summary)
        for name, write in files.items() if report else ():
            before_file()
            if self._is_writer:
                with self._directory.replacing(name) as path:
                    write(path)
        before_file()
        # On one device, as load_run returns it.
        state = jax.device_put(jax.device_get(state), jax.local_devices()[0])
        metadata = dataclasses.replace(self._metadata, history=tuple(self.history))
        return Run.of(self._directory, metadata, self._trainer.task, state)
