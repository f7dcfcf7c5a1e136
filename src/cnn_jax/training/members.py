"""Many runs as one program: members, which differ in their seed and learning rate only.

Each device trains members of its own, with whole batches, so the devices exchange nothing. The members of a device are
vectorized with ``jax.vmap``, which fills a GPU or TPU that a small network leaves idle. The training examples lie on
every device, and a batch is gathered there.

On a CPU, vectorizing is slower than training one member after the other, so there should be a member per device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cnn_jax.training.input import BatchIndices
from cnn_jax.training.loop import Progress, Trainer
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.sharding import MEMBERS, REPLICATED, data_parallel, replicate, shard_members
from cnn_jax.training.state import TrainState
from cnn_jax.training.step import Batch, train_step
from cnn_jax.training.task import Task


class Examples(NamedTuple):
    """The training examples, a copy on every device.

    Attributes:
        images: uint8 ``[N, H, W, C]``.
        labels: int32 ``[N]``.
    """

    images: jax.Array
    labels: jax.Array


class MemberChunk(NamedTuple):
    """The batches of consecutive steps, as indices of examples.

    Attributes:
        indices: int32 ``[members, steps, batch]``: every member has an order of its own.
        mask: bool ``[steps, batch]``, False for padding.
        num_examples: int32 ``[steps]``, number of examples in each batch, excluding padding.
        epoch: int32 scalar, counted from 0.
        num_steps: int32 scalar, number of steps to take; the remaining batches are undefined.
    """

    indices: jax.Array
    mask: jax.Array
    num_examples: jax.Array
    epoch: jax.Array
    num_steps: jax.Array


CHUNK_SPECS = MemberChunk(MEMBERS, REPLICATED, REPLICATED, REPLICATED, REPLICATED)
"""The partition specs of a chunk."""


@partial(jax.jit, static_argnames=("task", "mesh"), donate_argnames="states")
def train_member_chunk(
    states: TrainState,
    metrics: Metrics,
    chunk: MemberChunk,
    examples: Examples,
    keys: jax.Array,
    learning_rates: jax.Array,
    *,
    task: Task,
    mesh: Mesh,
) -> tuple[TrainState, Metrics]:
    """Take the steps of a chunk for all members. Every leaf of an argument per member has them as its first axis.

    Args:
        states: the states before the chunk; their memory is donated.
        metrics: the metrics of the epoch so far.
        chunk: the batches.
        examples: the training examples.
        keys: the members' random keys, ``[members]``.
        learning_rates: float32 ``[members]``.
        task: the model, optimizer, loss and preprocessing of all members; static.
        mesh: the devices, whose number divides that of the members; static.

    Returns:
        The states after the chunk, and the metrics of the epoch including it.
    """

    def take_steps(
        states: TrainState,
        metrics: Metrics,
        chunk: MemberChunk,
        examples: Examples,
        keys: jax.Array,
        learning_rates: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        def train_member(
            state: TrainState, metrics: Metrics, indices: jax.Array, key: jax.Array, learning_rate: jax.Array
        ) -> tuple[TrainState, Metrics]:
            def body(step: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
                state, metrics = carry
                batch = Batch(
                    examples.images[indices[step]],
                    examples.labels[indices[step]],
                    chunk.mask[step],
                    chunk.num_examples[step],
                    chunk.epoch,
                )
                state, step_metrics = train_step(state, batch, key, learning_rate, task=task)
                return state, metrics + step_metrics

            return jax.lax.fori_loop(0, chunk.num_steps, body, (state, metrics))

        return _over_members(train_member)(states, metrics, chunk.indices, keys, learning_rates)

    in_specs = (MEMBERS, MEMBERS, CHUNK_SPECS, REPLICATED, MEMBERS, MEMBERS)
    return data_parallel(take_steps, mesh, in_specs, MEMBERS)(states, metrics, chunk, examples, keys, learning_rates)


def _over_members(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.vmap``, but a single member is not vectorized, so that it compiles to the program of a run."""

    def mapped(*args: Any) -> Any:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        result = function(*jax.tree.map(lambda leaf: leaf[0], args))
        return jax.tree.map(lambda leaf: leaf[jnp.newaxis], result)

    return mapped


class MembersTrainer:
    """Trains members, each of which ends with the result of its own run, up to rounding.

    Args:
        trainers: one for each member, on the devices of all. Their settings differ in seed and learning rate only. The
            number of devices divides that of the members.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self._trainers = trainers
        first = trainers[0]
        self._task, self._mesh, self._config = first.task, first.mesh, first.config
        train = first.dataset.train
        self._examples = replicate(Examples(train.images, train.labels), self._mesh)
        self._batch_size = min(self._config.batch_size, len(train))
        self._chunk_steps = first.chunk_steps
        self._keys = shard_members(jnp.stack([trainer.step_key for trainer in trainers]), self._mesh)
        rates = np.array([trainer.config.learning_rate for trainer in trainers], np.float32)
        self._learning_rates = shard_members(rates, self._mesh)

    def compile(self, progress: Sequence[Progress]) -> float:
        """Compile by running a chunk of no steps and an evaluation; return the seconds it took."""
        began = time.perf_counter()
        states, metrics = self._stacked(progress)
        jax.block_until_ready(self._train_chunk(states, metrics, epoch=0, start=0, stop=0))
        self._trainers[0].evaluate(progress[0].state, self._trainers[0].selection_split)
        return time.perf_counter() - began

    def epochs(
        self,
        progress: Sequence[Progress],
        *,
        before_chunk: Callable[[int, Callable[[], list[Progress]]], None] = lambda step, copy_progress: None,
    ) -> Iterator[list[Progress]]:
        """Train from ``progress`` to the end of the last epoch.

        Args:
            progress: where each member starts, all at the same step.
            before_chunk: called before the next chunk, with the step and a function that copies the members' progress.

        Yields:
            The progress of each member at the end of each epoch, with the metrics of the epoch, as numpy arrays.
        """
        steps_per_epoch, step = self._trainers[0].steps_per_epoch, progress[0].step
        states, metrics = self._stacked(progress)
        began = time.perf_counter() - progress[0].seconds * len(progress)
        while step < self._config.epochs * steps_per_epoch:
            epoch, done = divmod(step, steps_per_epoch)
            before_chunk(step, partial(self._split, step, states, metrics, began))
            before = metrics
            stop = min(done + self._trainers[0].next_stop(step) - step, steps_per_epoch)
            states, metrics = self._train_chunk(states, metrics, epoch, done, stop)
            jax.block_until_ready(before)
            step += stop - done
            if stop == steps_per_epoch:
                jax.block_until_ready(metrics)
                yield self._split(step, states, metrics, began)
                metrics = self._stack([Metrics.zero()] * len(progress))
                began = time.perf_counter()

    def _train_chunk(
        self, states: TrainState, metrics: Metrics, epoch: int, start: int, stop: int
    ) -> tuple[TrainState, Metrics]:
        steps = range(start, start + self._chunk_steps)
        batches = [
            BatchIndices.of(trainer.epoch_order(epoch), steps, self._batch_size, slice(0, self._batch_size))
            for trainer in self._trainers
        ]
        chunk = MemberChunk(
            shard_members(np.stack([batch.indices for batch in batches]), self._mesh),
            *replicate((*batches[0][1:], np.int32(epoch), np.int32(stop - start)), self._mesh),
        )
        return train_member_chunk(
            states,
            metrics,
            chunk,
            self._examples,
            self._keys,
            self._learning_rates,
            task=self._task,
            mesh=self._mesh,
        )

    def _stacked(self, progress: Sequence[Progress]) -> tuple[TrainState, Metrics]:
        return self._stack([(member.state, member.metrics) for member in progress])

    def _stack(self, trees: Sequence[Any]) -> Any:
        return shard_members(jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(trees)), self._mesh)

    def _split(self, step: int, states: TrainState, metrics: Metrics, began: float) -> list[Progress]:
        """The progress of each member, copied; the time is divided between them."""
        seconds = (time.perf_counter() - began) / len(self._trainers)
        leaves, structure = jax.tree.flatten(jax.tree.map(np.array, (states, metrics)))
        members = (structure.unflatten(member) for member in zip(*leaves, strict=True))
        return [Progress(step, state, metrics, seconds) for state, metrics in members]
