"""The lesson's step-by-step training on one batch, in JAX.

    python scripts/single_batch.py

This passes a batch of 100 images through the network, computes the loss, the number of correct predictions and the
gradients, and updates the weights. After that, the loss on the same batch is smaller.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from cnn_jax import cli
from cnn_jax.config import Config
from cnn_jax.data import load
from cnn_jax.training.loop import create_task
from cnn_jax.training.metrics import num_correct
from cnn_jax.training.step import Batch, loss_fn


def main(args: Sequence[str]) -> int:
    """Print the values of each section and return the exit status."""
    parser = argparse.ArgumentParser(description="Train on one batch, step by step as in the lesson.")
    parser.add_argument("--dataset", default=Config.dataset, help="as for cnn_jax.train (default: %(default)s)")
    parser.add_argument("--data-dir", help="directory of the datasets")
    flags = parser.parse_args(args)

    print("Get a batch")
    config = Config(dataset=flags.dataset, data_dir=flags.data_dir)
    dataset = load(config)
    images, labels = (jnp.asarray(array[: config.batch_size]) for array in (dataset.train.images, dataset.train.labels))
    batch = Batch.of(images, labels)
    print(f"  {dataset.name}: images {images.dtype}{list(images.shape)}, labels {labels.dtype}{list(labels.shape)}")

    print("Make the network and the optimizer")
    task = create_task(config, len(dataset.class_names))
    key = jax.random.key(config.seed)
    state = jax.jit(task.init, static_argnums=1)(key, dataset.image_shape)
    print(f"  {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters")

    # In PyTorch, the loss records the computation, and loss.backward() stores the gradients in the parameters. In JAX,
    # value_and_grad transforms the loss function into one that also returns the gradients, and jit compiles it. There
    # are no stored gradients to zero.
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="task")

    print("Forward pass, loss and gradients")
    (loss, (logits, _)), grads = value_and_grad(state.params, state.model_state, task, batch, key)
    print(f"  logits {logits.dtype}{list(logits.shape)}")
    print(f"loss1: {loss:.6f}")
    print(f"number correct: {num_correct(logits, labels)} of {len(labels)}")
    for path, grad in jax.tree.leaves_with_path(grads):
        print(f"  gradient of {jax.tree_util.keystr(path, simple=True, separator='.')}: {list(grad.shape)}")

    print("Update the weights")
    updates, _ = task.optimizer.update(grads, state.opt_state, state.params, config.learning_rate)
    params = optax.apply_updates(state.params, updates)
    (loss, (logits, _)), _ = value_and_grad(params, state.model_state, task, batch, key)
    print(f"loss2: {loss:.6f}")
    print(f"number correct: {num_correct(logits, labels)} of {len(labels)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
