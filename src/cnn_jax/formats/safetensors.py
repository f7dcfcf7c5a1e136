"""Weights as safetensors, with Flax's names, joined by dots, and layouts: parameters and batch statistics."""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cnn_jax.formats.network import Classifier, Network
from cnn_jax.formats.state_dict import flatten
from cnn_jax.formats.weights import open_weights

ALIGNMENT = 8
"""Alignment of the data in bytes: the header is padded to a multiple, so that arrays can be memory-mapped."""


def to_bytes(network: Network) -> bytes:
    """Convert a network to the content of a safetensors file."""
    return encode(flatten(network.variables), {"format": "flax", **network.metadata})


def load(path: Path, network: Network) -> Classifier:
    """Load the weights in a file into the network."""
    variables = open_weights(path).variables(network.model, network.variables, network.image_shape)
    return dataclasses.replace(network, params=variables.pop("params"), model_state=variables).probabilities


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Encode float32 arrays by name in the format of https://huggingface.co/docs/safetensors.

    Unlike the safetensors library, which writes the metadata in random order, this always gives the same bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + b"".join(array.astype("<f4").tobytes() for array in arrays.values())
