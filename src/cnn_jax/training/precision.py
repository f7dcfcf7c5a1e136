"""The precision of matrix products and convolutions, which depends on the device unless it is chosen.

| | CPU | GPU | TPU |
| --- | --- | --- | --- |
| ``"default"`` | float32 | TF32 factors, if the GPU has them | bfloat16 factors |
| ``"float32"`` | float32 | float32 | float32, as the sum of products of bfloat16 parts |
| ``"bfloat16"`` | bfloat16 | bfloat16 | bfloat16 |

TF32 and bfloat16 factors are rounded float32 numbers with 10 and 7 bits of mantissa; their products are added up in
float32. With ``"bfloat16"``, also the numbers between the layers are bfloat16, which halves the memory traffic, and the
last layer and Muon have the device's default precision. In all cases, parameters, gradients, optimizer state, batch
statistics, logits and the loss are float32.

On TPUs, XLA takes much longer to compile convolutions in float32: for the lesson's network, minutes instead of seconds.
"""

import contextlib
from typing import Literal

import jax
import jax.numpy as jnp

from cnn_jax.training.state import Variables

Precision = Literal["default", "float32", "bfloat16"]


def matmul_precision(precision: Precision) -> contextlib.AbstractContextManager:
    """A context in which products of float32 numbers, and those of their gradients, are traced with a precision."""
    return jax.default_matmul_precision("float32") if precision == "float32" else contextlib.nullcontext()


def compute_in(precision: Precision, variables: Variables, images: jax.Array) -> tuple[Variables, jax.Array]:
    """Cast what a model multiplies: the images, and all parameters with several axes.

    Biases and the parameters of normalization have one axis. The layers add and scale in float32, without this cast.

    Args:
        precision: the precision.
        variables: the model's variables.
        images: its input, float32.
    """
    if precision != "bfloat16":
        return variables, images
    cast = lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf  # noqa: E731
    return {**variables, "params": jax.tree.map(cast, variables["params"])}, images.astype(jnp.bfloat16)
