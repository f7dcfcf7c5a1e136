"""Reading initial weights from a safetensors file or a PyTorch state_dict, without executing code from the file."""

import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from cnn_jax.errors import UsageError
from cnn_jax.formats.state_dict import from_state_dict, to_state_dict
from cnn_jax.training.state import Params

FLOATS = {"F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
"""Accepted dtypes of weights, as named by safetensors and by PyTorch."""

MAX_NAMES = 1 << 20
"""Maximum size of the names and shapes in a file in bytes; the largest networks need about a hundred thousand."""

MAX_ZIPPED = 1 << 30
"""Maximum size of a state_dict file in bytes, because its table of contents is read into memory."""

MAX_SHOWN = 4
"""Maximum number of differences to list in an error message."""

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""The names under which training scripts save a state_dict along with other values."""

WRAPPERS = ("module.", "_orig_mod.")
"""The prefixes that ``torch.nn.DataParallel`` and ``torch.compile`` add to the names of weights."""

REMEDY = "set --init-from to a run directory, a safetensors file, or a state_dict saved by PyTorch 1.6 or later"


class Tensor(NamedTuple):
    """An array in a file, which is read only after its shape and dtype have been checked."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """A float32 array in memory."""
        return cls(array.shape, "F32", lambda: np.asarray(array))


def read_params(path: Path, target: Params, image_shape: tuple[int, int, int]) -> Params:
    """Read weights with Flax's or PyTorch's names and layouts.

    Args:
        path: a safetensors file, or one written by ``torch.save(network.state_dict(), path)``.
        target: the expected parameters, or their shapes.
        image_shape: ``(H, W, C)`` of the network's input images.

    Returns:
        The parameters, float32.

    Raises:
        UsageError: the file cannot be read, its weights do not match ``target``, or they are not finite.
    """
    return to_params(open_weights(path), target, image_shape, path)


def to_params(tensors: Mapping[str, Tensor], target: Params, image_shape: tuple[int, int, int], source: Path) -> Params:
    """Convert weights with Flax's or PyTorch's names and layouts, of 16, 32 or 64 bits, to parameters.

    Args:
        tensors: the weights by name.
        target: the expected parameters, or their shapes.
        image_shape: ``(H, W, C)`` of the network's input images.
        source: where the weights come from, for error messages.

    Returns:
        The parameters, float32.

    Raises:
        UsageError: the weights do not match ``target``, or they are not finite.
    """
    in_pytorch = any(name.endswith(".weight") for name in tensors)
    if in_pytorch:
        expected = jax.eval_shape(partial(to_state_dict, image_shape=image_shape), target)
    else:
        expected = flatten_dict(target, sep=".")
    if differences := list(_differences(tensors, expected)):
        more = f", and {len(differences) - MAX_SHOWN} more" if len(differences) > MAX_SHOWN else ""
        raise UsageError(
            f"the weights in {source} do not match this network for {'x'.join(map(str, image_shape))} images: "
            f"{', '.join(differences[:MAX_SHOWN])}{more}; set --init-from to weights of the same network"
        )
    with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is checked below
        arrays = {name: np.array(tensors[name].read(), np.float32) for name in expected}
    if nonfinite := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UsageError(f"{nonfinite[0]} in {source} contains infinity or NaN: set --init-from to other weights")
    return from_state_dict(arrays, image_shape) if in_pytorch else unflatten_dict(arrays, sep=".")


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> Iterable[str]:
    for name, target in expected.items():
        if name not in tensors:
            yield f"{name} {list(target.shape)} is missing"
        elif tensors[name].shape != target.shape:
            yield f"{name} has shape {reprlib.repr(list(tensors[name].shape))} instead of {list(target.shape)}"
        elif tensors[name].dtype not in FLOATS:
            yield f"{name} has dtype {tensors[name].dtype} instead of float32"
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"{reprlib.repr(name)[1:-1]} {reprlib.repr(list(tensor.shape))} is unexpected"


def open_weights(path: Path) -> dict[str, Tensor]:
    """Read the names, shapes and dtypes of the weights in a file.

    Raises:
        UsageError: the file cannot be read, or contains no weights.
    """
    try:
        if not path.is_file():  # reading from a pipe might never end
            raise UsageError(f"there is no file {path}: {REMEDY}")
        with path.open("rb") as file:
            header = file.read(8)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    # PyTorch writes zip archives; as a safetensors header length, their signature would be far above the maximum.
    if header[:2] == b"PK":
        return _open_state_dict(path)
    if len(header) < 8 or struct.unpack("<Q", header)[0] > MAX_NAMES:
        raise UsageError(f"{path} contains no weights: {REMEDY}")
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    # The library maps the file into memory and checks the header against the size of the file.
    try:
        file = safe_open(path, framework="np")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: Tensor(tuple(part.get_shape()), part.get_dtype(), partial(file.get_tensor, name))
            for name, part in parts.items()
        }
    except (SafetensorError, OSError):
        raise UsageError(f"{path} is damaged or not a safetensors file: {REMEDY}") from None


def _open_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ModuleNotFoundError:
        raise UsageError(
            f"reading the state_dict {path} needs PyTorch: pip install -e '.[torch]', or set --init-from to a "
            "safetensors file"
        ) from None

    def is_plain(tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
            and not (tensor.is_nested or tensor.is_neg())
        )

    try:
        # Memory-mapped, so that no memory is allocated before the shapes have been checked.
        options = {"map_location": "cpu", "weights_only": True, "mmap": True}
        content = torch.load(path, **options) if _is_plain_archive(path) else None
    except Exception:  # for a malformed file, PyTorch may raise anything
        content = None
    content = _unwrapped(content)
    if not isinstance(content, dict) or not all(type(k) is str and is_plain(v) for k, v in content.items()):
        raise UsageError(f"{path} is damaged, larger than 1 GiB, or not a state_dict: {REMEDY}")
    return {
        name: Tensor(tuple(tensor.shape), str(tensor.dtype), lambda tensor=tensor: tensor.detach().float().numpy())
        for name, tensor in content.items()
    }


def _unwrapped(content: Any) -> Any:
    """The state_dict in what a training script saved, without the prefixes of wrappers around the network."""
    if isinstance(content, dict):
        content = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), content)
    for prefix in WRAPPERS * 2:  # in either order
        if isinstance(content, dict) and content and all(str(name).startswith(prefix) for name in content):
            content = {str(name).removeprefix(prefix): value for name, value in content.items()}
    return content


def _is_plain_archive(path: Path) -> bool:
    """Whether nothing in a zip archive is compressed, as PyTorch writes it: compressed data can expand to any size."""
    if path.stat().st_size > MAX_ZIPPED:
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    pickles = (member.file_size for member in members if member.filename.endswith(".pkl"))
    return all(member.compress_type == zipfile.ZIP_STORED for member in members) and sum(pickles) <= MAX_NAMES
