"""The lesson's training step as pure functions: forward pass, loss, gradient, update."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cnn_jax.models.layers import BatchContext
from cnn_jax.training.metrics import NO_STEP, Metrics, num_correct
from cnn_jax.training.precision import matmul_precision
from cnn_jax.training.sharding import device_index, sum_over_devices
from cnn_jax.training.state import Params, TrainState, Variables
from cnn_jax.training.task import Task


class Batch(NamedTuple):
    """A batch of examples, padded at the end to a fixed size; inside ``jax.shard_map``, one device's part of it.

    Attributes:
        images: uint8 ``[B, H, W, C]``.
        labels: int32 ``[B]``.
        mask: bool ``[B]``, False for padding.
        num_examples: int32 scalar, number of examples in the whole batch, excluding padding.
        epoch: int32 scalar, counted from 0.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array
    num_examples: jax.Array
    epoch: jax.Array

    @classmethod
    def of(cls, images: jax.Array, labels: jax.Array) -> "Batch":
        """Create a batch of epoch 0 without padding."""
        return cls(images, labels, jnp.ones(len(labels), bool), jnp.int32(len(labels)), jnp.int32(0))


def loss_fn(
    params: Params, model_state: Variables, task: Task, batch: Batch, key: jax.Array, axis_name: str | None = None
) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
    """Mean loss over the examples of a batch.

    Args:
        params: the model's parameters, with respect to which the loss is differentiated.
        model_state: the model's other collections.
        task: the model, loss and preprocessing.
        batch: the examples.
        key: determines augmentation and dropout.
        axis_name: the axis that the batch is sharded over, inside ``jax.shard_map``.

    Returns:
        The loss, a float32 scalar, and as auxiliary data the logits ``[B, classes]`` and the updated collections. The
        losses of a batch's parts add up to the loss of the whole batch. The loss of a mixture of two examples is the
        mixture of its losses for both labels.
    """
    size = len(batch.labels)
    context = BatchContext(device_index(axis_name) * size + jnp.arange(size), batch.mask, axis_name)
    augment_key, dropout_key = jax.random.split(key)
    mixed = task.augment(batch.images, batch.labels, context.keys(augment_key), batch.epoch)
    logits, model_state = task.train_logits(params, model_state, mixed.images, context, dropout_key)
    losses = task.loss(logits, batch.labels)
    if task.augment.mixes:
        losses = mixed.weight * losses + (1 - mixed.weight) * task.loss(logits, mixed.other_labels)
    loss = jnp.sum(losses, where=batch.mask) / batch.num_examples.astype(jnp.float32)
    return loss, (logits, model_state)


@partial(jax.jit, static_argnames=("task", "axis_name"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    learning_rate: jax.typing.ArrayLike,
    *,
    task: Task,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one training step: forward pass, loss, gradient, update.

    Args:
        state: the state before the step; its memory is donated.
        batch: the examples.
        key: the run's random key, into which the step is folded.
        learning_rate: the highest one, a float32 scalar.
        task: the model, optimizer, loss and preprocessing; static.
        axis_name: the axis that the batch is sharded over, inside ``jax.shard_map``; static.

    Returns:
        The state after the step, and the metrics of the step, computed before the update.
    """
    key = jax.random.fold_in(key, state.step)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, model_state)), grads = value_and_grad(state.params, state.model_state, task, batch, key, axis_name)
    correct = num_correct(logits, batch.labels, batch.mask)
    grads, loss, correct = sum_over_devices((grads, loss, correct), axis_name)
    with matmul_precision(task.precision):  # Muon multiplies matrices
        updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params, learning_rate)
    params = optax.apply_updates(state.params, updates)
    averaged_params = state.averaged_params
    if averaged_params is not None:
        # A smaller decay at first, as in TensorFlow, so that the initial parameters are soon forgotten.
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(task.average_decay, (1 + count) / (10 + count))
        averaged_params = optax.incremental_update(params, averaged_params, 1 - decay)
    new_state = TrainState(state.step + 1, params, model_state, opt_state, averaged_params)
    # A gradient that is not finite makes the parameters not finite.
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(params))
    return new_state, Metrics(loss, correct, batch.num_examples, jnp.where(finite, NO_STEP, state.step))
