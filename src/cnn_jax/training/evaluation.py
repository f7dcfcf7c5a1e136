"""Inference on any number of images, and how good it is."""

import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import logsumexp

from cnn_jax.training.sharding import BATCHES, REPLICATED, data_parallel, padded, replicate, shard_batches
from cnn_jax.training.state import Variables
from cnn_jax.training.task import Task

MAX_BATCH = 256
"""Maximum number of images in a batch."""

MAX_BATCH_BYTES = 1 << 20
"""Maximum size of a batch of images in bytes, if a single image does not exceed it.

On a CPU with two processors larger batches of 64x64 images are slower, and those of larger images not faster; and the
memory that the first convolution takes is 40 to 100 times that of the images.
"""

MAX_CHUNK_BYTES = 1 << 26
"""Maximum size of the images of a call of the compiled program in bytes."""


class Score(NamedTuple):
    """How good logits are.

    Attributes:
        loss: mean cross-entropy.
        accuracy: fraction of the examples whose largest logit is their label's.
    """

    loss: float
    accuracy: float


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """The score of logits float ``[N, classes]`` for labels int ``[N]``, every example once, computed in float64."""
    logits = logits.astype(np.float64)
    losses = logsumexp(logits, axis=-1) - logits[np.arange(len(labels)), labels]
    return Score(float(losses.mean()), float(np.mean(logits.argmax(axis=-1) == labels)))


def batch_size_for(image_shape: tuple[int, int, int], num_images: int) -> int:
    """The number of images to classify at a time, a power of two, so that few programs are compiled.

    Args:
        image_shape: ``(H, W, C)`` of the uint8 images.
        num_images: how many there are.

    Returns:
        From 1 to ``MAX_BATCH``, and less than twice the number of images.
    """
    largest = max(1, min(MAX_BATCH, MAX_BATCH_BYTES // math.prod(image_shape)))
    largest = 1 << (largest.bit_length() - 1)
    return min(largest, 1 << (max(1, num_images) - 1).bit_length())


def predict_logits(task: Task, variables: Variables, images: np.ndarray, *, batch_size: int, mesh: Mesh) -> np.ndarray:
    """The logits float32 ``[N, classes]`` of uint8 images ``[N, H, W, C]``."""
    batch = padded(min(batch_size, max(1, len(images))), mesh)
    steps = -(-len(images) // batch)
    chunk_steps = max(1, min(steps, MAX_CHUNK_BYTES // (batch * math.prod(images.shape[1:]))))
    variables = replicate(variables, mesh)
    chunks = []
    for start in range(0, max(1, len(images)), chunk_steps * batch):
        part = images[start : start + chunk_steps * batch]
        filled = np.zeros((chunk_steps * batch, *images.shape[1:]), np.uint8)
        filled[: len(part)] = part
        batches = shard_batches(filled.reshape(chunk_steps, batch, *images.shape[1:]), mesh)
        chunks.append(_chunk_logits(variables, batches, task=task, mesh=mesh))
    logits = np.concatenate(jax.device_get(chunks))
    return logits.reshape(-1, logits.shape[-1])[: len(images)]


@partial(jax.jit, static_argnames=("task", "mesh"))
def _chunk_logits(variables: Variables, images: jax.Array, *, task: Task, mesh: Mesh) -> jax.Array:
    """``[steps, batch, classes]`` for ``[steps, batch, H, W, C]``, one batch after the other."""

    def chunk_logits(variables: Variables, images: jax.Array) -> jax.Array:
        return jax.lax.map(partial(task.logits, variables), images)

    return data_parallel(chunk_logits, mesh, (REPLICATED, BATCHES), BATCHES)(variables, images)
