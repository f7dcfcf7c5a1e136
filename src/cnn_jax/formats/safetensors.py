"""Weights as safetensors: in Flax's names, joined by dots, and layouts."""

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from cnn_jax.formats.network import Classifier, Network
from cnn_jax.formats.weights import read_params

ALIGNMENT = 8
"""Bytes of which the header's length is a multiple, so that the numbers can be used in place."""


def to_bytes(network: Network) -> bytes:
    """The file."""
    return encode(flatten_dict(network.params, sep="."), {"format": "flax", **network.metadata})


def load(path: Path, network: Network) -> Classifier:
    """The network with the weights in a file."""
    params = read_params(path, network.params, network.image_shape)
    return dataclasses.replace(network, params=params).probabilities


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Float32 arrays by name, as https://huggingface.co/docs/safetensors describes the form.

    The library of that name orders the metadata differently each time; this is the same for the same, byte for byte.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + b"".join(array.astype("<f4").tobytes() for array in arrays.values())
