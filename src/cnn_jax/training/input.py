"""Batches for training, in chunks of steps, gathered on the host while the devices compute the previous chunk."""

import math
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cnn_jax.data import Split
from cnn_jax.data.shuffle import epoch_order
from cnn_jax.data.streamed import ReadAhead, StreamedImages
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


class BatchIndices(NamedTuple):
    """Which examples the batches of consecutive steps have.

    Attributes:
        indices: int32 ``[steps, batch]``; padding repeats the epoch's last example.
        mask: bool ``[steps, batch]``, False for padding.
        num_examples: int32 ``[steps]``, number of examples in each batch, excluding padding.
    """

    indices: np.ndarray
    mask: np.ndarray
    num_examples: np.ndarray

    @classmethod
    def of(cls, order: np.ndarray, steps: range, batch_size: int, part: slice) -> "BatchIndices":
        """The batches of some steps of an epoch.

        Args:
            order: the epoch's order of the examples, int32 ``[N]``.
            steps: the steps, counted from the start of the epoch; those after its end are all padding.
            batch_size: number of examples per batch.
            part: the part of each padded batch to return.
        """
        first = np.arange(steps.start, steps.stop, dtype=np.int32) * np.int32(batch_size)
        places = np.arange(part.start, part.stop, dtype=np.int32)
        num_examples = np.clip(len(order) - first, 0, batch_size).astype(np.int32)
        indices = order[np.minimum(first[:, np.newaxis] + places, len(order) - 1)]
        return cls(indices, places < num_examples[:, np.newaxis], num_examples)


class Source(Protocol):
    """A source of batches; a chunk depends only on the epoch and the steps."""

    steps_per_epoch: int
    chunk_steps: int

    def chunk(self, epoch: int, start: int, stop: int) -> Chunk:
        """The batches of steps ``start`` to ``stop`` (exclusive) of an epoch, at most ``chunk_steps``."""


class ArraySource:
    """Batches of a split, which is held once per process, in memory or in memory-mapped files, or decoded as it goes.

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
        self._reader: ReadAhead | None = None
        self._reader_place = (-1, -1)  # the epoch and the step that it reads next
        self.steps_per_epoch = num_batches(len(split), batch_size)
        step_bytes = padded(batch_size, mesh) * math.prod(split.images.shape[1:])
        self.chunk_steps = chunk_length(self.steps_per_epoch, step_bytes, max_chunk_steps)

    def chunk(self, epoch: int, start: int, stop: int) -> Chunk:
        """See ``Source.chunk``."""
        images, labels = self._split.images, self._split.labels
        steps, length = range(start, start + self.chunk_steps), stop - start
        batches = self._batches(epoch, steps)
        chosen = np.empty((*batches.indices.shape, *images.shape[1:]), np.uint8)
        if isinstance(images, StreamedImages):
            self._read(images, epoch, start, stop, chosen[:length])
        else:
            # Ten times as fast as indexing, which also makes a copy.
            np.take(images, batches.indices[:length], axis=0, out=chosen[:length], mode="clip")
        sharded = shard_batches((chosen, labels[batches.indices], batches.mask), self._mesh)
        epochs = np.full(self.chunk_steps, epoch, np.int32)
        replicated = replicate((batches.num_examples, epochs, np.int32(length)), self._mesh)
        return Chunk(Batch(*sharded, *replicated[:2]), replicated[2])

    def _batches(self, epoch: int, steps: range) -> BatchIndices:
        """The examples of this process in the batches of some steps of an epoch."""
        part = local_part(padded(self._batch_size, self._mesh), self._mesh)
        return BatchIndices.of(self.epoch_order(epoch), steps, self._batch_size, part)

    def _read(self, images: StreamedImages, epoch: int, start: int, stop: int, out: np.ndarray) -> None:
        """Read the images of a chunk. If it follows the previous one, they are being decoded already.

        After the last chunk of an epoch, the first images of the next one are decoded while the network is evaluated.
        """
        if start == stop:
            return
        if self._reader_place != (epoch, start):
            self._start_reading(images, epoch, start)
        self._reader.read_into(out.reshape(-1, *out.shape[2:]))
        self._reader_place = (epoch, stop)
        if stop == self.steps_per_epoch:
            self._start_reading(images, epoch + 1, 0)

    def _start_reading(self, images: StreamedImages, epoch: int, step: int) -> None:
        if self._reader:
            self._reader.close()
        indices = self._batches(epoch, range(step, self.steps_per_epoch)).indices
        self._reader = images[indices.ravel()].ahead(self.chunk_steps * indices.shape[1])
        self._reader_place = (epoch, step)

    def close(self) -> None:
        """Decode no more images ahead."""
        if self._reader:
            self._reader.close()
        self._reader, self._reader_place = None, (-1, -1)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The order of the examples in an epoch, int32 ``[N]``."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._split), self._seed, epoch, self._shuffle))
        return self._order[1]
