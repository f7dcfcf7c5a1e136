"""Batches for training, in chunks of steps, gathered on the host while the devices compute the previous chunk."""

from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cnn_jax.data import Split
from cnn_jax.data.shuffle import epoch_order
from cnn_jax.training.sharding import BATCHES, REPLICATED, local_part, padded, replicate, shard_batches
from cnn_jax.training.step import Batch

MAX_CHUNK_STEPS = 100
"""Maximum number of steps in a chunk. Metrics, signals and checkpoints are handled between chunks."""

MAX_CHUNK_BYTES = 1 << 26
"""Maximum size in bytes of the images of a chunk, if a single step does not exceed it."""


class Chunk(NamedTuple):
    """The batches of consecutive steps.

    Attributes:
        batches: arrays ``[steps, batch, ...]``, sharded over the batch, and ``num_examples`` and ``epoch`` ``[steps]``,
            replicated.
            All chunks of a source have the same shapes, so that one compiled program serves all of them.
        num_steps: int32 scalar, number of steps to take; the remaining batches are undefined.
    """

    batches: Batch
    num_steps: jax.Array


CHUNK_SPECS = Chunk(Batch(BATCHES, BATCHES, BATCHES, REPLICATED, REPLICATED), REPLICATED)
"""The partition specs of a chunk."""


def num_batches(num_examples: int, batch_size: int) -> int:
    """The number of batches in an epoch; the last one may be smaller."""
    return -(-num_examples // batch_size)


def chunk_length(num_steps: int, step_bytes: int, max_steps: int = MAX_CHUNK_STEPS) -> int:
    """The number of steps in a chunk.

    Args:
        num_steps: number of steps in all.
        step_bytes: size in bytes of the images of a step, over all devices.
        max_steps: maximum number of steps in a chunk.
    """
    return max(1, min(max_steps, num_steps, MAX_CHUNK_BYTES // step_bytes))


class Source(Protocol):
    """A source of batches; a chunk depends only on the epoch and the steps."""

    steps_per_epoch: int
    chunk_steps: int

    def chunk(self, epoch: int, start: int, stop: int) -> Chunk:
        """The batches of steps ``start`` to ``stop`` (exclusive) of an epoch, at most ``chunk_steps``."""


class ArraySource:
    """Batches of a split, which is held once per process, in memory or in memory-mapped files.

    Args:
        split: the examples.
        batch_size: number of examples per step, over all devices.
        seed: determines the order of the examples.
        shuffle: whether to shuffle the examples in every epoch.
        mesh: the devices.
        max_chunk_steps: maximum number of steps in a chunk.

    Attributes:
        steps_per_epoch: number of batches in an epoch; the last one is padded if it is smaller.
        chunk_steps: maximum number of steps in a chunk.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        mesh: Mesh,
        max_chunk_steps: int = MAX_CHUNK_STEPS,
    ):
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._mesh = mesh
        self._order = (-1, np.empty(0, np.int32))  # the epoch and its order
        self.steps_per_epoch = num_batches(len(split), batch_size)
        step_bytes = padded(batch_size, mesh) * split.images[0].nbytes
        self.chunk_steps = chunk_length(self.steps_per_epoch, step_bytes, max_chunk_steps)

    def chunk(self, epoch: int, start: int, stop: int) -> Chunk:
        """See ``Source.chunk``."""
        order = self._epoch_order(epoch)
        images, labels = self._split.images, self._split.labels
        batch = padded(self._batch_size, self._mesh)
        positions = np.arange(batch)[local_part(batch, self._mesh)]  # of this process
        steps = np.arange(start, stop)
        num_examples = np.zeros(self.chunk_steps, np.int32)
        num_examples[: len(steps)] = np.minimum(self._batch_size, len(order) - steps * self._batch_size)
        mask = positions < num_examples[:, np.newaxis]
        places = np.minimum(steps[:, np.newaxis] * self._batch_size + positions, len(order) - 1)
        chosen = order[places]
        arrays = Batch(
            np.empty((self.chunk_steps, len(positions), *images.shape[1:]), np.uint8),
            np.zeros((self.chunk_steps, len(positions)), np.int32),
            mask,
            replicate(num_examples, self._mesh),
            replicate(np.full(self.chunk_steps, epoch, np.int32), self._mesh),
        )
        # Ten times as fast as indexing, which also makes a copy.
        np.take(images, chosen, axis=0, out=arrays.images[: len(steps)], mode="clip")
        arrays.labels[: len(steps)] = labels[chosen]
        batches = shard_batches(arrays[:3], self._mesh)
        return Chunk(Batch(*batches, *arrays[3:]), replicate(np.int32(len(steps)), self._mesh))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._split), self._seed, epoch, self._shuffle))
        return self._order[1]
