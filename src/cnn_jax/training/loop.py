"""The lesson's training loop, with the steps of an epoch in chunks."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.data.statistics import mean_and_std
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.models import create_model
from cnn_jax.training.augment import Augment
from cnn_jax.training.evaluation import Score, predict_logits, score
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.input import CHUNK_SPECS, MAX_CHUNK_STEPS, ArraySource, Chunk, num_batches
from cnn_jax.training.metrics import NO_STEP, CrossEntropy, Metrics, balanced_class_weights
from cnn_jax.training.optimizer import Optimizer, Schedule, num_steps
from cnn_jax.training.sharding import AXIS, REPLICATED, data_parallel, make_mesh, replicate
from cnn_jax.training.state import TrainState
from cnn_jax.training.step import train_step
from cnn_jax.training.task import SCALE, Normalize, Task
from cnn_jax.training.waiting import IdleTime


@partial(jax.jit, static_argnames=("task", "mesh"), donate_argnames="state")
def train_chunk(
    state: TrainState,
    metrics: Metrics,
    chunk: Chunk,
    key: jax.Array,
    learning_rate: jax.Array,
    *,
    task: Task,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    """Take the steps of a chunk, in one compiled program for any number of steps.

    Metrics are accumulated in the order of the steps, so that the results are bitwise equal for any chunk length.

    Args:
        state: the state before the chunk; its memory is donated.
        metrics: the metrics of the epoch so far.
        chunk: the batches, sharded over the devices.
        key: the run's random key, the same for all steps.
        learning_rate: the highest one, a float32 scalar.
        task: the model, optimizer, loss and preprocessing; static.
        mesh: the devices; static.

    Returns:
        The state after the chunk, and the metrics of the epoch including it.
    """

    def take_steps(
        state: TrainState, metrics: Metrics, chunk: Chunk, key: jax.Array, learning_rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(step: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            batch = jax.tree.map(lambda batches: batches[step], chunk.batches)
            state, step_metrics = train_step(state, batch, key, learning_rate, task=task, axis_name=AXIS)
            return state, metrics + step_metrics

        return jax.lax.fori_loop(0, chunk.num_steps, body, (state, metrics))

    in_specs = (REPLICATED, REPLICATED, CHUNK_SPECS, REPLICATED, REPLICATED)
    return data_parallel(take_steps, mesh, in_specs, REPLICATED)(state, metrics, chunk, key, learning_rate)


def create_state(task: Task, image_shape: tuple[int, int, int], key: jax.Array, mesh: Mesh) -> TrainState:
    """Create the state at step 0 on every device of a mesh. Raises the same errors as ``Task.init``."""
    # XLA's CPU compiler takes seconds to optimize the random number generator, which runs only once.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = jax.jit(Task.init, static_argnums=(0, 2), compiler_options=options)
    return replicate(init(task, key, image_shape), mesh)


def abstract_state(task: Task, image_shape: tuple[int, int, int]) -> TrainState:
    """The shapes and dtypes of the state at step 0. Raises the same errors as ``Task.init``."""
    return jax.eval_shape(partial(task.init, image_shape=image_shape), jax.random.key(0))


def create_task(
    config: Config,
    num_classes: int,
    preprocess: Normalize = SCALE,
    *,
    steps_per_epoch: int = 1,
    class_weights: tuple[float, ...] | None = None,
) -> Task:
    """Create the task that a config describes.

    Args:
        config: the settings.
        num_classes: number of logits.
        preprocess: the result of ``create_preprocess``.
        steps_per_epoch: number of batches in an epoch, which schedules in epochs depend on.
        class_weights: the weights of the classes, if ``config.class_weights`` is not ``"none"``.

    Raises:
        UsageError: unknown model or model option, or settings that contradict each other.
    """
    frozen = config.freeze == "backbone"
    if frozen and config.backbone_rate != 1:
        raise UsageError("--freeze backbone leaves nothing to train at --backbone-rate: set only one of them")
    model = create_model(
        config.model,
        num_classes,
        depth=config.model_depth,
        width=config.model_width,
        dropout=config.model_dropout,
        freeze_backbone=frozen,
    )
    schedule = Schedule(
        config.schedule,
        updates=config.epochs * steps_per_epoch // config.accumulate,
        warmup=-(-num_steps(config.warmup, steps_per_epoch) // config.accumulate),
    )
    optimizer = Optimizer(
        config.optimizer,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        backbone_rate=0.0 if frozen else config.backbone_rate,
        head=model.HEAD,
        schedule=schedule,
    )
    return Task(
        model,
        optimizer,
        loss=CrossEntropy(config.label_smoothing, class_weights),
        preprocess=preprocess,
        augment=Augment(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Augment)}),
        tta=config.tta,
        average_decay=config.average_decay or None,
        precision=config.precision,
    )


def create_task_for(config: Config, dataset: Dataset, preprocess: Normalize | None = None) -> Task:
    """Create the task that a config describes for a dataset.

    Args:
        config: the settings.
        dataset: its training split determines the number of steps, the weights of the classes, and the preprocessing.
        preprocess: the conversion of images to the network's input instead, such as that of pretrained weights.

    Raises:
        UsageError: as in ``create_task``.
    """
    num_classes = len(dataset.class_names)
    steps_per_epoch = num_batches(len(dataset.train), config.batch_size)
    if config.accumulate > (steps := config.epochs * steps_per_epoch):
        raise UsageError(
            f"--accumulate {config.accumulate} is more than the {steps} steps of the run: set a smaller one"
        )
    balanced = config.class_weights == "balanced"
    return create_task(
        config,
        num_classes,
        preprocess or create_preprocess(config, dataset),
        steps_per_epoch=steps_per_epoch,
        class_weights=balanced_class_weights(dataset.train.labels, num_classes) if balanced else None,
    )


def create_preprocess(config: Config, dataset: Dataset) -> Normalize:
    """Create the preprocessing that a config describes; the training split determines its mean and std."""
    return Normalize(*mean_and_std(dataset.train.images)) if config.normalize else SCALE


class ChunkReport(NamedTuple):
    """Progress within an epoch.

    Attributes:
        epoch: counted from 0.
        steps_done: steps taken in the epoch.
        steps: steps in the epoch.
        metrics: metrics of the steps taken, on the device.
    """

    epoch: int
    steps_done: int
    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class Progress:
    """A point in training, which together with the config and the dataset determines the rest of it.

    Attributes:
        step: number of steps taken, which determines the epoch and the position in it.
        state: the state after these steps; the next chunk reuses its memory.
        metrics: metrics of the epoch so far.
        seconds: training time of the epoch so far.
        input_wait_seconds: the part of it in which the devices waited for images.
    """

    step: int
    state: TrainState
    metrics: Metrics
    seconds: float = 0.0
    input_wait_seconds: float = 0.0


class NonFiniteError(CnnJaxError):
    """The loss or the gradient of a step is infinite or NaN."""


class Trainer:
    """Trains and evaluates the model of a config on a dataset.

    Args:
        config: the settings.
        dataset: the examples, which stay in host memory.
        devices: the devices to train on; by default all devices of all processes.
        task: the task to train; by default the one that the config describes.
        max_chunk_steps: maximum number of steps in a chunk.

    Attributes:
        config: the settings.
        dataset: the examples.
        task: the task that is trained.
        mesh: the devices.
        step_key: the random key of the steps, into which each step is folded.
        steps_per_epoch: number of batches in an epoch.
        chunk_steps: maximum number of steps in a chunk.
        selection_split: the name of the split that is scored after each epoch.
        abstract_state: the shapes and dtypes of the state.

    Raises:
        UsageError: unknown model, images too small for it or for the augmentation, settings that contradict each other,
            or batch normalization with batches of one example.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        devices: Sequence[jax.Device] | None = None,
        task: Task | None = None,
        max_chunk_steps: int = MAX_CHUNK_STEPS,
    ):
        self.config = config
        self.dataset = dataset
        self.mesh = make_mesh(devices)
        self.task = task or create_task_for(config, dataset)
        self.task.augment.check(dataset.image_shape)
        self._batch_size = min(config.batch_size, len(dataset.train))  # the rest would be padding
        self._source = ArraySource(
            dataset.train,
            batch_size=self._batch_size,
            seed=config.seed,
            shuffle=config.shuffle,
            mesh=self.mesh,
            max_chunk_steps=max_chunk_steps,
        )
        self.steps_per_epoch = self._source.steps_per_epoch
        self.chunk_steps = self._source.chunk_steps
        self.selection_split = "validation" if "validation" in dataset.splits else "test"
        self._waiting_thread = ThreadPoolExecutor(1)
        self._key = jax.random.key(config.seed)
        # The key itself initializes the parameters.
        self.step_key = replicate(jax.random.fold_in(self._key, 1), self.mesh)
        self._learning_rate = replicate(np.float32(config.learning_rate), self.mesh)
        self.abstract_state = abstract_state(self.task, dataset.image_shape)
        if self._batch_size == 1 and self.abstract_state.model_state and config.freeze == "none":
            raise UsageError(
                f"the batch normalization of {config.model} needs batches of at least 2 examples: set a larger "
                "--batch-size"
            )

    def start(self) -> Progress:
        """The progress at step 0, with parameters determined by the config's seed."""
        state = create_state(self.task, self.dataset.image_shape, self._key, self.mesh)
        return Progress(0, state, self._no_metrics())

    def compile(self) -> float:
        """Compile both programs by running a chunk of no steps and an evaluation; return the seconds it took."""
        began = time.perf_counter()
        start = self.start()
        chunk = self._source.chunk(epoch=0, start=0, stop=0)
        state, _ = self._train_chunk(start.state, start.metrics, chunk)
        self.evaluate(state, self.selection_split)
        return time.perf_counter() - began

    def epochs(
        self,
        progress: Progress,
        *,
        on_chunk: Callable[[ChunkReport], None] = lambda report: None,
        before_chunk: Callable[[Progress], None] = lambda progress: None,
    ) -> Iterator[tuple[EpochRecord, Progress]]:
        """Train from ``progress`` to the end of the last epoch.

        Args:
            progress: where to start; its memory is reused.
            on_chunk: called with the progress of the epoch, each time after the next chunk has been dispatched.
            before_chunk: called with the progress before the next chunk reuses its memory, to save it or to stop.

        Yields:
            The record of each epoch, and the progress at its end.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; raised at the latest after the next chunk.
        """
        state, metrics = replicate((progress.state, progress.metrics), self.mesh)
        progress = dataclasses.replace(progress, state=state, metrics=metrics)
        try:
            while progress.step < self.config.epochs * self.steps_per_epoch:
                progress = self._train_epoch(progress, on_chunk, before_chunk)
                record, progress = self.end_epoch(progress)
                yield record, progress
        finally:
            self._source.close()

    def end_epoch(self, progress: Progress) -> tuple[EpochRecord, Progress]:
        """Score the state at the end of an epoch; return the epoch's record, and the progress with no metrics yet."""
        score, _ = self.evaluate(progress.state, self.selection_split)
        return self._record(progress, score), Progress(progress.step, progress.state, self._no_metrics())

    def evaluate(self, state: TrainState, split: str) -> tuple[Score, np.ndarray]:
        """Score the dataset's split of that name; return its score and logits float32 ``[N, classes]``."""
        images, labels = self.dataset.splits[split].images, self.dataset.splits[split].labels
        logits = predict_logits(self.task, state.variables, images, batch_size=self._batch_size, mesh=self.mesh)
        return score(logits, labels), logits

    def check_finite(self, metrics: Metrics) -> None:
        """Raise NonFiniteError if a step was not finite; this waits until the metrics are computed."""
        if (step := int(metrics.first_nonfinite_step)) != NO_STEP:
            raise NonFiniteError(
                f"the loss or the gradient is not finite at step {step}: start a new run with a --learning-rate below "
                f"{self.config.learning_rate:g}"
            )

    def _train_epoch(
        self,
        progress: Progress,
        on_chunk: Callable[[ChunkReport], None],
        before_chunk: Callable[[Progress], None],
    ) -> Progress:
        began = time.perf_counter() - progress.seconds
        step, state, metrics, waited = progress.step, progress.state, progress.metrics, progress.input_wait_seconds
        epoch, done = divmod(step, self.steps_per_epoch)
        first_step = step - done
        while done < self.steps_per_epoch:
            before_chunk(Progress(step, state, metrics, time.perf_counter() - began, waited))
            report = ChunkReport(epoch, done, self.steps_per_epoch, metrics)
            stop = min(self.next_stop(step) - first_step, self.steps_per_epoch)
            with IdleTime(metrics, self._waiting_thread) as idle:
                chunk = self._source.chunk(epoch, done, stop)
            waited += idle.seconds
            state, metrics = self._train_chunk(state, metrics, chunk)
            self.check_finite(report.metrics)
            on_chunk(report)
            step, done = first_step + stop, stop
        metrics = jax.device_get(metrics)
        self.check_finite(metrics)
        return Progress(step, state, metrics, time.perf_counter() - began, waited)

    def next_stop(self, step: int) -> int:
        """The step to end the next chunk at: after a full chunk, or earlier if a checkpoint is due."""
        stop = step + self.chunk_steps
        if every := self.config.checkpoint_every:
            stop = min(stop, (step // every + 1) * every)
        return stop

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The order of the training examples in an epoch, int32 ``[N]``."""
        return self._source.epoch_order(epoch)

    def _train_chunk(self, state: TrainState, metrics: Metrics, chunk: Chunk) -> tuple[TrainState, Metrics]:
        return train_chunk(state, metrics, chunk, self.step_key, self._learning_rate, task=self.task, mesh=self.mesh)

    def _record(self, progress: Progress, score: Score) -> EpochRecord:
        train = progress.metrics
        scores = {f"{self.selection_split}_loss": score.loss, f"{self.selection_split}_accuracy": score.accuracy}
        return EpochRecord(
            epoch=progress.step // self.steps_per_epoch - 1,
            step=progress.step,
            total_correct=int(train.num_correct),
            loss=float(train.loss),
            train_accuracy=float(train.num_correct / train.num_examples),
            seconds=progress.seconds,
            images_per_second=float(train.num_examples / progress.seconds),
            input_wait_seconds=progress.input_wait_seconds,
            **{"test_loss": None, "test_accuracy": None, **scores},
        )

    def _no_metrics(self) -> Metrics:
        return replicate(Metrics.zero(), self.mesh)
