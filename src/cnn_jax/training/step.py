"""The lesson's cycle for one batch, as pure functions."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from cnn_jax.training.metrics import NO_STEP, Metrics

Params = dict[str, Any]


class Batch(NamedTuple):
    """A fixed number of examples; the last batch of an epoch is filled up with examples that do not count.

    Attributes:
        images: uint8 ``[B, H, W, C]``.
        labels: int32 ``[B]``.
        mask: bool ``[B]``, false for padding.
        num_examples: int32, the examples that count; where this is a device's part of a batch, those of the whole.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array
    num_examples: jax.Array

    @classmethod
    def of(cls, images: jax.Array, labels: jax.Array) -> "Batch":
        """A batch in which every example counts."""
        return cls(images, labels, jnp.ones(len(labels), bool), jnp.int32(len(labels)))


def scale(images: jax.Array) -> jax.Array:
    """Uint8 images to float32 in [0, 1], as torchvision's ``ToTensor`` does."""
    return images.astype(jnp.float32) / 255


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Each example's loss: float32 ``[B, classes]`` and int32 ``[B]`` to float32 ``[B]``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def num_correct(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """How many of the examples that count have their largest logit at their label, an int32 scalar."""
    return jnp.sum(logits.argmax(axis=-1) == labels, where=mask, dtype=jnp.int32)


def loss_fn(params: Params, apply_fn: Callable[..., jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy over the examples of a batch that count.

    Args:
        params: the model's parameters, with respect to which this is differentiated.
        apply_fn: ``apply_fn({"params": params}, images)`` gives the logits of float32 images.
        batch: the examples.

    Returns:
        The loss, a float32 scalar, and the logits ``[B, classes]``. The losses of a batch's parts add up to its own.
    """
    logits = eval_step(params, apply_fn, batch.images)
    return jnp.sum(cross_entropy(logits, batch.labels), where=batch.mask) / batch.num_examples, logits


@partial(jax.jit, static_argnames="reduce_grads", donate_argnames="state")
def train_step(
    state: TrainState, batch: Batch, *, reduce_grads: Callable[[Any], Any] = lambda tree: tree
) -> tuple[TrainState, Metrics]:
    """Forward pass, loss, gradient, Adam update.

    Args:
        state: parameters and optimiser state; its memory is given to the new state.
        batch: the examples.
        reduce_grads: where each of several devices has a part of the batch, the sum over them of a tree of arrays.

    Returns:
        The state one step on, and this step's metrics, taken before the update.
    """
    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, state.apply_fn, batch)
    grads, loss, correct = reduce_grads((grads, loss, num_correct(logits, batch.labels, batch.mask)))
    new_state = state.apply_gradients(grads=grads)
    # A gradient that is not finite makes parameters that are not.
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(new_state.params))
    return new_state, Metrics(loss, correct, batch.num_examples, jnp.where(finite, NO_STEP, state.step))


def eval_step(params: Params, apply_fn: Callable[..., jax.Array], images: jax.Array) -> jax.Array:
    """The forward pass alone.

    Args:
        params: the model's parameters.
        apply_fn: as for ``loss_fn``.
        images: uint8 ``[B, H, W, C]``.

    Returns:
        The logits ``[B, classes]``.
    """
    return apply_fn({"params": params}, scale(images))
