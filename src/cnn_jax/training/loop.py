"""The lesson's loop: batches into chunks, chunks into epochs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.sharding import Mesh

from cnn_jax.config import Config
from cnn_jax.data import Dataset
from cnn_jax.data.shuffle import epoch_order
from cnn_jax.errors import CnnJaxError
from cnn_jax.models import create_model
from cnn_jax.training.history import EpochRecord
from cnn_jax.training.metrics import NO_STEP, Metrics
from cnn_jax.training.sharding import (
    make_mesh,
    on_every_device,
    part_of_batch,
    parts_along,
    replicate,
    sum_over_devices,
)
from cnn_jax.training.state import abstract_train_state, create_train_state
from cnn_jax.training.step import Batch, Params, cross_entropy, eval_step, num_correct, train_step

CHUNK = 100
"""Steps per call of the compiled program: as many as the host leaves unwatched."""


def num_steps(num_examples: int, batch_size: int) -> int:
    """Batches that a pass over the examples takes, the last one as short as it comes."""
    return -(-num_examples // batch_size)


def take_batch(
    images: jax.Array, labels: jax.Array, order: jax.Array, step: jax.Array, batch_size: int, mesh: Mesh
) -> Batch:
    """The part that this device of the mesh has in the batch of one step of an epoch.

    Args:
        images: uint8 ``[N, H, W, C]``, the whole split.
        labels: int32 ``[N]``.
        order: int32 ``[steps * batch_size]``: the order of the examples, filled up to whole batches.
        step: of the epoch, counted from 0.
        batch_size: examples per batch, a multiple of the number of devices.
        mesh: the devices.
    """
    begin = step * batch_size
    offset, size = part_of_batch(mesh, batch_size)
    indices = jax.lax.dynamic_slice_in_dim(order, begin + offset, size)
    mask = begin + offset + jnp.arange(size) < len(labels)
    return Batch(images[indices], labels[indices], mask, jnp.minimum(batch_size, len(labels) - begin))


@partial(jax.jit, static_argnames=("batch_size", "mesh"), donate_argnames="state")
def train_chunk(
    state: TrainState,
    metrics: Metrics,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    first: jax.Array,
    last: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    """Steps ``first`` to ``last`` (exclusive) of an epoch as one program, whatever their number.

    The other arguments are those of ``take_batch``. The sums in ``metrics`` are carried on in the order of the
    steps, so that they come out the same to the bit however an epoch is cut into chunks.
    """

    def chunk(
        state: TrainState, metrics: Metrics, images: jax.Array, labels: jax.Array, order: jax.Array, *steps: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(step: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            batch = take_batch(images, labels, order, step, batch_size, mesh)
            state, step_metrics = train_step(state, batch, reduce_grads=sum_over_devices)
            return state, metrics + step_metrics

        return jax.lax.fori_loop(*steps, body, (state, metrics))

    return on_every_device(chunk, mesh)(state, metrics, images, labels, order, first, last)


@partial(jax.jit, static_argnames=("apply_fn", "batch_size", "mesh"))
def predict(
    params: Params, apply_fn: Callable[..., jax.Array], images: jax.Array, *, batch_size: int, mesh: Mesh
) -> jax.Array:
    """The logits ``[N, classes]`` of uint8 images ``[N, H, W, C]``, computed by batches."""
    batch_size = -(-min(batch_size, len(images)) // mesh.size) * mesh.size
    steps = num_steps(len(images), batch_size)

    def predict_parts(params: Params, images: jax.Array) -> jax.Array:
        def predict_part(step: jax.Array) -> jax.Array:
            offset, size = part_of_batch(mesh, batch_size)
            indices = step * batch_size + offset + jnp.arange(size)  # those past the end repeat the last image
            return eval_step(params, apply_fn, images[indices])

        return jax.lax.map(predict_part, jnp.arange(steps))

    logits = on_every_device(predict_parts, mesh, parts_along(axis=1))(params, images)
    return logits.reshape(steps * batch_size, -1)[: len(images)]


@partial(jax.jit, static_argnames=("apply_fn", "batch_size", "mesh"))
def evaluate(
    params: Params,
    apply_fn: Callable[..., jax.Array],
    images: jax.Array,
    labels: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh,
) -> tuple[Metrics, jax.Array]:
    """Score a whole split, every example once.

    Returns:
        The metrics, whose loss is summed over the examples, and the logits ``[N, classes]``.
    """
    logits = predict(params, apply_fn, images, batch_size=batch_size, mesh=mesh)
    loss = cross_entropy(logits, labels).sum()
    metrics = Metrics(loss, num_correct(logits, labels), jnp.int32(len(labels)), jnp.int32(NO_STEP))
    return metrics, logits


class ChunkReport(NamedTuple):
    """How far an epoch has come: ``steps_done`` of ``steps`` steps, and their metrics, on the device."""

    epoch: int
    steps_done: int
    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class Progress:
    """A training on its way: with the config and the data set, all that the rest of it is a function of.

    Attributes:
        step: steps taken, which tell the epoch and the place in it.
        state: after them; the next chunk reuses its memory.
        metrics: of the epoch so far.
        seconds: spent on the epoch so far.
    """

    step: int
    state: TrainState
    metrics: Metrics
    seconds: float


class NonFiniteError(CnnJaxError):
    """The loss or the gradient of a step is infinite or not a number."""


class Trainer:
    """A config's training and evaluation on a data set, whose examples it holds on the devices.

    Attributes:
        mesh: the devices that train.
        steps_per_epoch: batches an epoch.
        abstract_state: a state's shapes and dtypes.

    Raises:
        UsageError: unknown model, or images too small for it.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self._config = config
        self._batch_size = min(config.batch_size, len(dataset.train))  # nothing is gained by more padding than examples
        self.mesh = make_mesh(self._batch_size)
        self.steps_per_epoch = num_steps(len(dataset.train), self._batch_size)
        self._image_shape = dataset.image_shape
        self._model = create_model(config.model, len(dataset.class_names))
        self.abstract_state = abstract_train_state(self._model, self._image_shape, config.learning_rate)
        self._train, self._test = replicate(
            [(split.images, split.labels) for split in (dataset.train, dataset.test)], self.mesh
        )

    def start(self) -> Progress:
        """The beginning of training, a function of the config's seed."""
        key = jax.random.key(self._config.seed)
        state = create_train_state(self._model, self._image_shape, self._config.learning_rate, key)
        return Progress(0, replicate(state, self.mesh), self._no_metrics(), 0.0)

    def compile(self) -> float:
        """Have both programs compiled, by a chunk of no steps and an evaluation; returns the seconds it took."""
        began = time.perf_counter()
        start = self.start()
        state, _ = self._train_chunk(start.state, start.metrics, self._order(epoch=0), 0, 0)
        jax.block_until_ready(self.evaluate(state.params))
        return time.perf_counter() - began

    def epochs(
        self,
        progress: Progress,
        *,
        on_chunk: Callable[[ChunkReport], None] = lambda report: None,
        before_chunk: Callable[[Progress], None] = lambda progress: None,
    ) -> Iterator[tuple[EpochRecord, Progress]]:
        """Train from anywhere to the end of the config's last epoch.

        Args:
            progress: where to begin; its state's memory is reused.
            on_chunk: told how far the epoch has come, each time when the next chunk is already dispatched.
            before_chunk: given the progress while its memory is not yet reused, to save it or to stop.

        Yields:
            Each epoch's record, and the progress at its end.

        Raises:
            NonFiniteError: the loss or the gradient stopped being finite; known at the next chunk's end.
        """
        state, metrics = replicate((progress.state, progress.metrics), self.mesh)
        progress = Progress(progress.step, state, metrics, progress.seconds)
        for epoch in range(progress.step // self.steps_per_epoch, self._config.epochs):
            progress = self._train_epoch(progress, on_chunk, before_chunk)
            test_metrics, _ = self.evaluate(progress.state.params)
            record = self._record(epoch, progress, jax.device_get(test_metrics))
            progress = Progress(progress.step, progress.state, self._no_metrics(), 0.0)
            yield record, progress

    def evaluate(self, params: Params) -> tuple[Metrics, jax.Array]:
        """Metrics and logits of the test examples, as ``evaluate`` gives them."""
        return evaluate(params, self._model.apply, *self._test, batch_size=self._batch_size, mesh=self.mesh)

    def check_finite(self, metrics: Metrics) -> None:
        """Raise NonFiniteError where a step was not finite; waits for the steps that the metrics are of."""
        if (step := int(metrics.first_nonfinite_step)) != NO_STEP:
            raise NonFiniteError(
                f"the loss or the gradient is not finite at step {step}: train anew with a --learning-rate below "
                f"{self._config.learning_rate:g}"
            )

    def _train_epoch(
        self,
        progress: Progress,
        on_chunk: Callable[[ChunkReport], None],
        before_chunk: Callable[[Progress], None],
    ) -> Progress:
        began = time.perf_counter() - progress.seconds
        step, state, metrics = progress.step, progress.state, progress.metrics
        epoch = step // self.steps_per_epoch
        order = self._order(epoch)
        first_step, last_step = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        while step < last_step:
            before_chunk(Progress(step, state, metrics, time.perf_counter() - began))
            report = ChunkReport(epoch, step - first_step, self.steps_per_epoch, metrics)
            end = min(self._next_stop(step), last_step)
            state, metrics = self._train_chunk(state, metrics, order, step - first_step, end - first_step)
            self.check_finite(report.metrics)
            on_chunk(report)
            step = end
        metrics = jax.device_get(metrics)
        self.check_finite(metrics)
        return Progress(step, state, metrics, time.perf_counter() - began)

    def _next_stop(self, step: int) -> int:
        """The step at which the host looks up next: after a whole chunk, or where a checkpoint is to be written."""
        stop = step + CHUNK
        if every := self._config.checkpoint_every:
            stop = min(stop, (step // every + 1) * every)
        return stop

    def _train_chunk(
        self, state: TrainState, metrics: Metrics, order: jax.Array, first: int, last: int
    ) -> tuple[TrainState, Metrics]:
        # Put on the devices by name, so that a chunk can run under a guard against transfers.
        steps = replicate((np.int32(first), np.int32(last)), self.mesh)
        return train_chunk(state, metrics, *self._train, order, *steps, batch_size=self._batch_size, mesh=self.mesh)

    def _record(self, epoch: int, progress: Progress, test: Metrics) -> EpochRecord:
        train = progress.metrics
        return EpochRecord(
            epoch=epoch,
            step=progress.step,
            total_correct=int(train.num_correct),
            loss=float(train.loss),
            train_accuracy=float(train.num_correct / train.num_examples),
            test_loss=float(test.loss / test.num_examples),
            test_accuracy=float(test.num_correct / test.num_examples),
            seconds=progress.seconds,
            images_per_second=float(train.num_examples / progress.seconds),
        )

    def _order(self, epoch: int) -> jax.Array:
        _, labels = self._train
        order = epoch_order(len(labels), self._config.seed, epoch, self._config.shuffle)
        return replicate(np.resize(order, self.steps_per_epoch * self._batch_size), self.mesh)

    def _no_metrics(self) -> Metrics:
        return replicate(Metrics.zero(), self.mesh)
