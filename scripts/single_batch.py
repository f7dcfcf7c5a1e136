"""The lesson's walk through one batch, in JAX.

    python scripts/single_batch.py

A batch of 100 goes forward through the network, the loss and the number of correct predictions are taken, the gradients
are computed and the weights updated; then the same batch goes forward once more, and its loss is smaller.
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
    """Print each section's values; returns the exit status."""
    parser = argparse.ArgumentParser(description="Walk one batch through the lesson's sections.")
    parser.add_argument("--dataset", default=Config.dataset, help="as for cnn_jax.train (default: %(default)s)")
    parser.add_argument("--data-dir", help="where data sets are kept or already lie")
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
    state = task.init(key, dataset.image_shape)
    print(f"  {sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters")

    # In PyTorch the loss remembers how it came about, and loss.backward() leaves the gradients in the parameters.
    # Here the forward pass is a function, value_and_grad makes of it the function that returns the gradients too,
    # and jit compiles that: nothing to remember, and nothing to zero before the next time.
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnames="task")

    print("Forward pass, loss and gradients")
    (loss, (logits, _)), grads = value_and_grad(state.params, state.model_state, task, batch, key)
    print(f"  logits {logits.dtype}{list(logits.shape)}")
    print(f"loss1: {loss:.6f}")
    print(f"number correct: {num_correct(logits, labels)} of {len(labels)}")
    for path, grad in jax.tree.leaves_with_path(grads):
        print(f"  gradient of {jax.tree_util.keystr(path, simple=True, separator='.')}: {list(grad.shape)}")

    print("Update the weights")
    updates, _ = task.optimizer.transformation().update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    (loss, (logits, _)), _ = value_and_grad(params, state.model_state, task, batch, key)
    print(f"loss2: {loss:.6f}")
    print(f"number correct: {num_correct(logits, labels)} of {len(labels)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
