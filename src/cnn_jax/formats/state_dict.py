"""Conversion of parameters to and from the state_dict of the lesson's PyTorch network, for images of any size.

PyTorch's convolution kernels are ``[output, input, height, width]``, its linear layers store the transposed matrix, and
the input of its first linear layer is flattened in the order channel, row, column instead of row, column, channel.
"""

from collections.abc import Mapping

import numpy as np

from cnn_jax.training.state import Params

StateDict = Mapping[str, np.ndarray]


def to_state_dict(params: Params, image_shape: tuple[int, int, int]) -> StateDict:
    """Convert the parameters of the model ``cnn`` to PyTorch's names and layouts."""
    state_dict = {}
    for layer, parameters in params.items():
        kernel = parameters["kernel"]
        if layer == "fc1":
            kernel = kernel.reshape(*_pooled(image_shape), -1, kernel.shape[1])
            kernel = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[3])
        order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        state_dict |= {f"{layer}.weight": kernel.transpose(order), f"{layer}.bias": parameters["bias"]}
    return state_dict


def from_state_dict(state_dict: StateDict, image_shape: tuple[int, int, int]) -> Params:
    """The inverse of ``to_state_dict``."""
    params: Params = {}
    for name, array in state_dict.items():
        layer, _, kind = name.partition(".")
        if kind == "weight":
            kind, array = "kernel", array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        if name == "fc1.weight":
            array = array.reshape(-1, *_pooled(image_shape), array.shape[1])
            array = array.transpose(1, 2, 0, 3).reshape(-1, array.shape[3])
        params.setdefault(layer, {})[kind] = array
    return params


def _pooled(image_shape: tuple[int, int, int]) -> list[int]:
    """Height and width of the flattened feature maps, after two 5x5 convolutions, each followed by 2x2 pooling."""
    return [((size - 4) // 2 - 4) // 2 for size in image_shape[:2]]
