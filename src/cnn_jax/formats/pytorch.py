"""Weights for PyTorch, as safetensors: a state_dict of the module with the same structure as the model.

That of ``cnn`` is the lesson's ``Network`` (scripts/pytorch_lesson.py), those of the ResNets are torchvision's:

    network = torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(safetensors.torch.load_file("pytorch.safetensors"))

The files are verified by a forward pass in NumPy, so that this needs no PyTorch. Converting the weights back and
applying the Flax model would not detect an error that both conversions share.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file

from cnn_jax.errors import UsageError
from cnn_jax.formats.network import Classifier, Network
from cnn_jax.formats.safetensors import encode
from cnn_jax.formats.state_dict import StateDict, flatten, flattened_layers, to_state_dict
from cnn_jax.training.views import views

EPSILON = np.float32(1e-5)
"""What batch normalization adds to the variance, PyTorch's default."""

MAX_WINDOWS = 1 << 22
"""Maximum size of the windows of an image to convolve at once, in numbers, unless one row has more."""


def check_supported(model: str) -> None:
    """Raise UsageError unless a PyTorch module with the structure of this model is published."""
    if model not in FORWARD:
        raise UsageError(
            f"there is no PyTorch module for the network {model}, only for {', '.join(FORWARD)}: use --format "
            "safetensors for its weights, or onnx or stablehlo"
        )


def to_bytes(network: Network) -> bytes:
    """Convert a network to the content of a safetensors file with PyTorch's names and layouts.

    Raises:
        UsageError: there is no PyTorch module for the model.
    """
    check_supported(network.model)
    flattened = flattened_layers(network.model, network.image_shape)
    return encode(to_state_dict(flatten(network.variables), flattened), {"format": "pt", **network.metadata})


def load(path: Path, network: Network) -> Classifier:
    """Load the weights in a file into a NumPy implementation of the PyTorch network."""
    state_dict, forward = load_file(path), FORWARD[network.model]
    mean, std = np.float32(network.task.preprocess.mean), np.float32(network.task.preprocess.std)

    def logits_of(images: np.ndarray) -> np.ndarray:
        # One image at a time, so that only one is in memory as float32.
        inputs = ((image.astype(np.float32) / 255 - mean) / std for image in images)
        return np.stack([forward(state_dict, image.transpose(2, 0, 1)) for image in inputs])

    def probabilities(images: np.ndarray) -> np.ndarray:
        stacked, weights = views(images, network.task.tta)
        logits = sum(weight * logits_of(np.asarray(view)) for view, weight in zip(stacked, weights, strict=True))
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    return probabilities


def forward_cnn(state_dict: StateDict, image: np.ndarray) -> np.ndarray:
    """The lesson's network with PyTorch's layouts: an image float32 ``[C, H, W]`` to its logits."""
    x = image
    for layer in ("conv1", "conv2"):
        x = convolve(x, state_dict[f"{layer}.weight"]) + state_dict[f"{layer}.bias"][:, None, None]
        channels, height, width = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(channels, height // 2, 2, width // 2, 2)
        x = np.maximum(x.max(axis=(2, 4)), 0)
    x = x.reshape(-1)
    for layer in ("fc1", "fc2"):
        x = np.maximum(_linear(state_dict, layer, x), 0)
    return _linear(state_dict, "out", x)


def forward_resnet(state_dict: StateDict, image: np.ndarray) -> np.ndarray:
    """A ResNet of torchvision: an image float32 ``[C, H, W]`` to its logits.

    The blocks, and whether they are bottlenecks, are found by the names in the state_dict.
    """

    def conv_norm(x: np.ndarray, conv: str, norm: str, stride: int) -> np.ndarray:
        weight = state_dict[f"{conv}.weight"]
        x = convolve(x, weight, stride, padding=weight.shape[2] // 2)
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (state_dict[f"{norm}.{name}"][:, None, None] for name in names)
        return (x - mean) / np.sqrt(var + EPSILON) * weight + bias

    def block(x: np.ndarray, name: str, stride: int) -> np.ndarray:
        is_bottleneck = f"{name}.conv3.weight" in state_dict
        strides = (1, stride, 1) if is_bottleneck else (stride, 1)
        y = x
        for number, conv_stride in enumerate(strides, start=1):
            y = y if number == 1 else np.maximum(y, 0)
            y = conv_norm(y, f"{name}.conv{number}", f"{name}.bn{number}", conv_stride)
        if f"{name}.downsample.0.weight" in state_dict:
            x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        return np.maximum(x + y, 0)

    x = np.maximum(conv_norm(image, "conv1", "bn1", stride=2), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)))  # max-pooling pads with minus infinity, but nothing is negative here
    x = sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(3, 4))
    for stage in range(1, 5):
        for index in count():
            name = f"layer{stage}.{index}"
            if f"{name}.conv1.weight" not in state_dict:
                break
            x = block(x, name, stride=2 if stage > 1 and index == 0 else 1)
    return _linear(state_dict, "fc", x.mean(axis=(1, 2)))


FORWARD: dict[str, Callable[[StateDict, np.ndarray], np.ndarray]] = {
    "cnn": forward_cnn,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), forward_resnet),
}
"""The models with a PyTorch module of the same structure, and its forward pass."""


def convolve(image: np.ndarray, weight: np.ndarray, stride: int = 1, padding: int = 0) -> np.ndarray:
    """Compute the cross-correlation, as PyTorch's ``conv2d`` does.

    This computes a few output rows at a time, because NumPy copies the windows, and those of a whole image take 25
    times its memory.

    Args:
        image: ``[C, H, W]``.
        weight: ``[O, C, KH, KW]``.
        stride: the distance of windows, in both axes.
        padding: number of zeros on each side, in both axes.

    Returns:
        ``[O, (H + 2 padding - KH) // stride + 1, (W + 2 padding - KW) // stride + 1]``.
    """
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(padded, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
    rows = max(1, MAX_WINDOWS // (weight[0].size * windows.shape[2]))
    blocks = np.split(windows, range(rows, windows.shape[1], rows), axis=1)
    return np.concatenate([np.tensordot(weight, block, axes=((1, 2, 3), (0, 3, 4))) for block in blocks], axis=1)


def _linear(state_dict: StateDict, layer: str, x: np.ndarray) -> np.ndarray:
    return state_dict[f"{layer}.weight"] @ x + state_dict[f"{layer}.bias"]
