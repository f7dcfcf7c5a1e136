"""Sums over steps, kept on the device and divided once."""

import jax
import jax.numpy as jnp
from flax import struct

NO_STEP = 2**31 - 1
"""The step at which something happened that did not happen."""


@struct.dataclass
class Metrics:
    """What the steps of a pass over a data set add up to; every field is a scalar on the device.

    Attributes:
        loss: float32. A training step adds its batch's mean loss, as the lesson's loop does; an evaluation step
            adds the losses of its examples.
        num_correct: int32, examples whose largest logit is their label's.
        num_examples: int32, examples seen; padding does not count.
        first_nonfinite_step: int32, the first step whose loss or new parameters were not finite, or ``NO_STEP``.
    """

    loss: jax.Array
    num_correct: jax.Array
    num_examples: jax.Array
    first_nonfinite_step: jax.Array

    @classmethod
    def zero(cls) -> "Metrics":
        """The sum over no steps."""
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(NO_STEP))

    @classmethod
    def from_numbers(cls, numbers: dict[str, float]) -> "Metrics":
        """The metrics that ``to_numbers`` gave, to the bit."""
        zero = cls.zero()
        return cls(**{name: jnp.asarray(value, getattr(zero, name).dtype) for name, value in numbers.items()})

    def to_numbers(self) -> dict[str, float]:
        """The fields as Python's numbers, for JSON."""
        return {name: value.item() for name, value in vars(jax.device_get(self)).items()}

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics(
            loss=self.loss + other.loss,
            num_correct=self.num_correct + other.num_correct,
            num_examples=self.num_examples + other.num_examples,
            first_nonfinite_step=jnp.minimum(self.first_nonfinite_step, other.first_nonfinite_step),
        )
