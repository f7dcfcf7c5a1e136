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
from cnn_jax.training.members import Examples, MemberChunk, train_member_chunk
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.sharding import BATCHES, MEMBERS, REPLICATED, padded
from cnn_jax.training.state import TrainState
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
    state, metrics = abstract_state(task, image_shape), jax.eval_shape(Metrics.zero)
    key, learning_rate = jax.eval_shape(lambda: (jax.random.key(0), jnp.float32(0)))
    state, metrics, key, learning_rate = _sharded((state, metrics, key, learning_rate), REPLICATED, mesh)
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
    return train_chunk.lower(state, metrics, chunk, key, learning_rate, task=task, mesh=mesh)


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


def lower_members(
    task: Task,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
    *,
    num_members: int,
    num_examples: int,
    batch_size: int,
    chunk_steps: int,
) -> jax.stages.Lowered:
    """Lower the program that takes the steps of a chunk for several runs.

    Args:
        task: what to train.
        image_shape: ``(H, W, C)``.
        mesh: the devices.
        num_members: number of runs, a multiple of the number of devices.
        num_examples: number of training examples.
        batch_size: number of examples per step of a run.
        chunk_steps: number of steps in a chunk.
    """

    def member() -> tuple[TrainState, Metrics, jax.Array, jax.Array, jax.Array]:
        state, key = task.init(jax.random.key(0), image_shape), jax.random.key(0)
        return state, Metrics.zero(), jnp.zeros((chunk_steps, batch_size), jnp.int32), key, jnp.float32(0)

    members = jax.eval_shape(jax.vmap(lambda index: member()), jnp.zeros(num_members))
    state, metrics, indices, keys, learning_rates = _sharded(members, MEMBERS, mesh)
    shared = (
        jax.ShapeDtypeStruct((chunk_steps, batch_size), jnp.bool),
        jax.ShapeDtypeStruct((chunk_steps,), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    images = jax.ShapeDtypeStruct((num_examples, *image_shape), jnp.uint8)
    examples = Examples(images, jax.ShapeDtypeStruct((num_examples,), jnp.int32))
    shared, examples = _sharded((shared, examples), REPLICATED, mesh)
    chunk = MemberChunk(indices, *shared)
    return train_member_chunk.lower(state, metrics, chunk, examples, keys, learning_rates, task=task, mesh=mesh)


def _sharded(tree: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
