"""Weights for PyTorch: the state_dict of the lesson's ``Network`` (scripts/pytorch_lesson.py), as safetensors.

network.load_state_dict(safetensors.torch.load_file("pytorch.safetensors"))
"""

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file

from cnn_jax.formats.network import Classifier, Network
from cnn_jax.formats.safetensors import encode
from cnn_jax.formats.state_dict import StateDict, to_state_dict


def to_bytes(network: Network) -> bytes:
    """Convert a network to the content of a safetensors file with PyTorch's parameter names and layouts."""
    return encode(to_state_dict(network.params, network.image_shape), {"format": "pt", **network.metadata})


def load(path: Path, network: Network) -> Classifier:
    """Load the weights in a file into a NumPy implementation of the PyTorch network."""
    state_dict = load_file(path)
    mean, std = np.float32(network.task.preprocess.mean), np.float32(network.task.preprocess.std)

    def probabilities(images: np.ndarray) -> np.ndarray:
        # One image at a time, so that only one is in memory as float32.
        inputs = ((image.astype(np.float32) / 255 - mean) / std for image in images)
        logits = np.stack([forward(state_dict, image.transpose(2, 0, 1)) for image in inputs])
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    return probabilities


def forward(state_dict: StateDict, image: np.ndarray) -> np.ndarray:
    """The forward pass of the lesson's network with PyTorch's layouts: an image float32 ``[C, H, W]`` to its logits.

    It is implemented in NumPy, so that exported weights can be verified without PyTorch. Converting the weights back
    and applying the Flax model would not detect an error that both conversions share.
    """
    x = image
    for layer in ("conv1", "conv2"):
        weight, bias = state_dict[f"{layer}.weight"], state_dict[f"{layer}.bias"]
        x = convolve(x, weight) + bias[:, None, None]
        channels, height, width = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(channels, height // 2, 2, width // 2, 2)
        x = np.maximum(x.max(axis=(2, 4)), 0)
    x = x.reshape(-1)
    for layer in ("fc1", "fc2"):
        x = np.maximum(state_dict[f"{layer}.weight"] @ x + state_dict[f"{layer}.bias"], 0)
    return state_dict["out.weight"] @ x + state_dict["out.bias"]


def convolve(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Compute the cross-correlation without padding, as PyTorch's ``conv2d`` does.

    This computes one output row at a time, because NumPy copies the windows, and those of a whole image take 25 times
    its memory.

    Args:
        image: ``[C, H, W]``.
        weight: ``[O, C, KH, KW]``.

    Returns:
        ``[O, H - KH + 1, W - KW + 1]``.
    """
    windows = sliding_window_view(image, weight.shape[2:], axis=(1, 2))
    rows = [np.tensordot(weight, windows[:, row], axes=((1, 2, 3), (0, 2, 3))) for row in range(windows.shape[1])]
    return np.stack(rows, axis=1)
