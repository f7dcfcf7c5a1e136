"""Exporting trained networks to file formats that other programs read, and importing weights."""

from typing import Literal

Format = Literal["stablehlo", "onnx", "safetensors", "pytorch"]

FILE_NAMES: dict[Format, str] = {
    "stablehlo": "model.stablehlo",
    "onnx": "model.onnx",
    "safetensors": "model.safetensors",
    "pytorch": "pytorch.safetensors",
}
"""The default name of the exported file in each format."""
