"""The training state."""

from typing import Any

import jax
import optax
from flax import struct

Params = dict[str, Any]
Variables = dict[str, Any]


@struct.dataclass
class TrainState:
    """Everything that changes during training; every leaf is an array and is saved in checkpoints.

    Attributes:
        step: int32 scalar, number of steps taken.
        params: the model's parameters.
        model_state: the model's other collections, such as ``batch_stats``; empty if it has none.
        opt_state: the optimizer's state.
        averaged_params: exponential moving average of ``params``, or None.
    """

    step: jax.Array
    params: Params
    model_state: Variables
    opt_state: optax.OptState
    averaged_params: Params | None = None

    @property
    def variables(self) -> Variables:
        """The model's variables for inference: the averaged parameters if there are any, and the other collections."""
        params = self.params if self.averaged_params is None else self.averaged_params
        return {"params": params, **self.model_state}
