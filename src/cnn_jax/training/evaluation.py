"""Inference on any number of images, and scoring."""

import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import logsumexp

from cnn_jax.data.streamed import Images, in_order
from cnn_jax.training.input import chunk_length
from cnn_jax.training.sharding import (
    BATCHES,
    REPLICATED,
    data_parallel,
    local_part,
    padded,
    replicate,
    shard_batches,
    to_host,
)
from cnn_jax.training.state import Variables
from cnn_jax.training.task import Task

MAX_BATCH = 256
"""Maximum number of images in a batch."""

MAX_BATCH_BYTES = 1 << 20
"""Maximum size of a batch of images in bytes, if a single image does not exceed it.

On a CPU with two processors, larger batches of 64x64 images are slower, and those of larger images are not faster. The
first convolution takes 40 to 100 times the memory of the images.
"""


BLOCK = 1 << 20
"""Number of logits converted to float64 at a time."""


class Score(NamedTuple):
    """Loss and accuracy.

    Attributes:
        loss: mean cross-entropy.
        accuracy: fraction of the examples correctly classified.
    """

    loss: float
    accuracy: float


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Score logits in float64.

    Args:
        logits: float ``[N, classes]``.
        labels: int ``[N]``.
    """
    losses = log_normalizers(logits) - logits[np.arange(len(labels)), labels].astype(np.float64)
    return Score(float(losses.mean()), float(np.mean(logits.argmax(axis=-1) == labels)))


def log_normalizers(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the sum of the exponentials of each row, float64 ``[N]``.

    Blocks of rows are converted to float64, so that this needs little memory.

    Args:
        logits: float ``[N, classes]``.
    """
    rows = max(1, BLOCK // logits.shape[-1])
    blocks = (logits[start : start + rows].astype(np.float64) for start in range(0, len(logits), rows))
    return np.concatenate([logsumexp(block, axis=-1) for block in blocks] or [np.empty(0)])


def batch_size_for(image_shape: tuple[int, int, int], num_images: int) -> int:
    """Choose a batch size for inference: a power of two, so that few programs are compiled.

    Args:
        image_shape: ``(H, W, C)`` of the uint8 images.
        num_images: number of images to classify.

    Returns:
        A batch size from 1 to ``MAX_BATCH``, less than twice the number of images.
    """
    largest = max(1, min(MAX_BATCH, MAX_BATCH_BYTES // math.prod(image_shape)))
    largest = 1 << (largest.bit_length() - 1)
    return min(largest, 1 << (max(1, num_images) - 1).bit_length())


def predict_logits(task: Task, variables: Variables, images: Images, *, batch_size: int, mesh: Mesh) -> np.ndarray:
    """Compute the logits of images, the same in all processes of the mesh, which all have to call this.

    Args:
        task: the model and the preprocessing.
        variables: the model's variables.
        images: uint8 ``[N, H, W, C]``.
        batch_size: number of images per batch, over all devices.
        mesh: the devices.

    Returns:
        Logits float32 ``[N, classes]``.
    """
    batch = padded(min(batch_size, max(1, len(images))), mesh)
    steps = -(-len(images) // batch)
    chunk_steps = chunk_length(steps, batch * math.prod(images.shape[1:]), max_steps=steps)
    variables = replicate(variables, mesh)
    chunks = []
    size = chunk_steps * batch
    reader = in_order(images, size)
    for start in range(0, max(1, len(images)), size):
        filled = np.zeros((size, *images.shape[1:]), np.uint8)
        reader.read_into(filled[: len(images) - start])
        batches = filled.reshape(chunk_steps, batch, *images.shape[1:])[:, local_part(batch, mesh)]
        chunks.append(chunk_logits(variables, shard_batches(batches, mesh), task=task, mesh=mesh))
        jax.block_until_ready(chunks[:-1])  # or the images of all chunks could be in memory
    logits = np.concatenate(to_host(chunks))
    return logits.reshape(-1, logits.shape[-1])[: len(images)]


@partial(jax.jit, static_argnames=("task", "mesh"))
def chunk_logits(variables: Variables, images: jax.Array, *, task: Task, mesh: Mesh) -> jax.Array:
    """Map images ``[steps, batch, H, W, C]`` to logits ``[steps, batch, classes]``, one batch at a time.

    Args:
        variables: the model's variables, replicated.
        images: uint8, sharded over the batch.
        task: the model and the preprocessing; static.
        mesh: the devices; static.
    """

    def map_batches(variables: Variables, images: jax.Array) -> jax.Array:
        return jax.lax.map(partial(task.logits, variables), images)

    return data_parallel(map_batches, mesh, (REPLICATED, BATCHES), BATCHES)(variables, images)
