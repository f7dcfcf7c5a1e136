"""Names and layouts of weights: in Flax, and in the state_dict of a PyTorch module with the same structure.

Both are flat: names joined by dots, with the parameters and the batch statistics side by side.

| | Flax | PyTorch |
| --- | --- | --- |
| convolution | ``kernel [height, width, input, output]`` | ``weight [output, input, height, width]`` |
| linear layer | ``kernel [input, output]`` | ``weight [output, input]`` |
| batch normalization | ``scale``, ``mean``, ``var`` | ``weight``, ``running_mean``, ``running_var`` |

Biases are the same. A linear layer that follows feature maps has their pixels as input in the order row, column,
channel in Flax, and in the order channel, row, column in PyTorch.
"""

from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cnn_jax.training.state import Variables

Arrays = Mapping[str, np.ndarray]
"""Weights by Flax's names."""

StateDict = Mapping[str, np.ndarray]
"""Weights by PyTorch's names."""

FeatureMaps = Mapping[str, tuple[int, int, int]]
"""The shape ``(H, W, C)`` of the feature maps before each linear layer whose input they are."""

NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
"""PyTorch's names of the arrays that are not called the same in Flax."""


def flattened_layers(model: str, image_shape: tuple[int, int, int]) -> FeatureMaps:
    """The linear layers of a model whose input are flattened feature maps, and the shape of these.

    Args:
        model: the architecture's name.
        image_shape: ``(H, W, C)`` of the network's input images.

    Returns:
        ``(H, W, C)`` by the name of the layer; empty for a model that averages its feature maps instead.
    """
    height, width = image_shape[:2]
    match model:
        case "cnn":  # two 5x5 convolutions without padding, each followed by 2x2 pooling
            return {"fc1": (((height - 4) // 2 - 4) // 2, ((width - 4) // 2 - 4) // 2, 12)}
    return {}


def flatten(variables: Variables) -> Arrays:
    """The arrays of all collections by name, such as ``bn1.scale`` of ``params`` and ``bn1.mean`` of ``batch_stats``.

    Args:
        variables: trees of arrays, or of anything else with a name, by collection.
    """
    return {name: leaf for tree in variables.values() for name, leaf in flatten_dict(tree, sep=".").items()}


def unflatten(arrays: Arrays, target: Variables) -> Variables:
    """The inverse of ``flatten``: the arrays in the collections in which ``target`` has their names."""
    return {
        collection: unflatten_dict({name: arrays[name] for name in flatten_dict(tree, sep=".")}, sep=".")
        for collection, tree in target.items()
    }


def to_state_dict(arrays: Arrays, flattened: FeatureMaps) -> StateDict:
    """Convert weights to PyTorch's names and layouts.

    ``num_batches_tracked`` of the batch normalizations is left out: ``load_state_dict`` sets it to zero.

    Args:
        arrays: weights by Flax's names.
        flattened: the result of ``flattened_layers``.
    """
    state_dict = {}
    for name, array in arrays.items():
        layer, _, kind = name.rpartition(".")
        if kind == "kernel":
            if layer in flattened:
                array = array.reshape(*flattened[layer], -1).transpose(2, 0, 1, 3).reshape(array.shape)
            array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
        state_dict[f"{layer}.{NAMES.get(kind, kind)}"] = array
    return state_dict


def from_state_dict(state_dict: StateDict, flattened: FeatureMaps) -> Arrays:
    """The inverse of ``to_state_dict``; a weight of one axis is the scale of a batch normalization."""
    arrays = {}
    for name, array in state_dict.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            kind = "scale" if array.ndim == 1 else "kernel"
        if kind == "kernel":
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))
            if layer in flattened:
                height, width, channels = flattened[layer]
                split = array.reshape(channels, height, width, -1)
                array = split.transpose(1, 2, 0, 3).reshape(array.shape)
        arrays[f"{layer}.{kind.removeprefix('running_')}"] = array
    return arrays
