"""Trained networks in the forms that other programs read, and weights in and out of them."""

from typing import Literal

Format = Literal["stablehlo", "onnx", "safetensors", "pytorch"]

FILE_NAMES: dict[Format, str] = {
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
    "safetensors": "model.safetensors",
    "pytorch": "pytorch.safetensors",
}
"""What the file is called in a run directory."""
