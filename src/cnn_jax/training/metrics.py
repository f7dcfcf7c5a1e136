"""Sums over steps, kept on the device and divided once."""

import operator

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Metrics:
    """What the steps of a pass over a data set add up to; every field is a scalar on the device.

    Attributes:
        loss: float32. A training step adds its batch's mean loss, as the lesson's loop does; an evaluation step
            adds the losses of its examples.
        num_correct: int32, examples whose largest logit is their label's.
        num_examples: int32, examples seen; padding does not count.
    """

    loss: jax.Array
    num_correct: jax.Array
    num_examples: jax.Array

    @classmethod
    def zero(cls) -> "Metrics":
        """The sum over no steps."""
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0))

    def __add__(self, other: "Metrics") -> "Metrics":
        return jax.tree.map(operator.add, self, other)
