"""The compiled programs of a run, lowered on shapes alone: for devices that this machine need not have.

The devices of the mesh may come from ``jax.experimental.topologies``. What ``lower_training`` and ``lower_evaluation``
return compiles to the programs that ``Trainer`` runs on such devices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.training.evaluation import chunk_logits
from cnn_jax.training.input import CHUNK_SPECS, Chunk, chunk_length
from cnn_jax.training.loop import abstract_state, train_chunk
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.sharding import BATCHES, REPLICATED, padded
from cnn_jax.training.step import Batch
from cnn_jax.training.task import Task


def lower_training(
    task: Task, image_shape: tuple[int, int, int], mesh: Mesh, *, batch_size: int, steps_per_epoch: int
) -> jax.stages.Lowered:
    """Lower the program that takes the steps of a chunk.

    Args:
        task: what to train.
        image_shape: ``(H, W, C)``.
        mesh: the devices.
        batch_size: number of examples per step, over all devices; at most the number of training examples.
        steps_per_epoch: number of batches in an epoch.
    """
    state, metrics, key = _sharded(
        (abstract_state(task, image_shape), jax.eval_shape(Metrics.zero), jax.eval_shape(lambda: jax.random.key(0))),
        REPLICATED,
        mesh,
    )
    batch = padded(batch_size, mesh)
    steps = chunk_length(steps_per_epoch, batch * math.prod(image_shape))
    batches = Batch(
        images=jax.ShapeDtypeStruct((steps, batch, *image_shape), jnp.uint8),
        labels=jax.ShapeDtypeStruct((steps, batch), jnp.int32),
        mask=jax.ShapeDtypeStruct((steps, batch), jnp.bool),
        num_examples=jax.ShapeDtypeStruct((steps,), jnp.int32),
        epoch=jax.ShapeDtypeStruct((steps,), jnp.int32),
    )
    chunk = Chunk(batches, jax.ShapeDtypeStruct((), jnp.int32))
    chunk = jax.tree.map(lambda leaf, spec: _sharded(leaf, spec, mesh), chunk, CHUNK_SPECS)
    return train_chunk.lower(state, metrics, chunk, key, task=task, mesh=mesh)


def lower_evaluation(
    task: Task, image_shape: tuple[int, int, int], mesh: Mesh, *, batch_size: int, num_images: int
) -> jax.stages.Lowered:
    """Lower the program that computes the logits of images.

    Args:
        task: the model and the preprocessing.
        image_shape: ``(H, W, C)``.
        mesh: the devices.
        batch_size: number of images per batch, over all devices.
        num_images: number of images to evaluate.
    """
    batch = padded(min(batch_size, num_images), mesh)
    num_batches = -(-num_images // batch)
    steps = chunk_length(num_batches, batch * math.prod(image_shape), max_steps=num_batches)
    variables = _sharded(abstract_state(task, image_shape).variables, REPLICATED, mesh)
    images = _sharded(jax.ShapeDtypeStruct((steps, batch, *image_shape), jnp.uint8), BATCHES, mesh)
    return chunk_logits.lower(variables, images, task=task, mesh=mesh)


def _sharded(tree: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
