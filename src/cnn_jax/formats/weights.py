"""Weights to start from: read from a safetensors file or a PyTorch state_dict, of which nothing is executed."""

import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from cnn_jax.errors import UsageError
from cnn_jax.formats.state_dict import from_state_dict, to_state_dict
from cnn_jax.training.state import Params

FLOATS = {"F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
"""What weights may be stored as, in safetensors' words and in PyTorch's."""

MAX_NAMES = 1 << 20
"""Bytes that names and shapes may take in a file; those of the largest networks take some hundred thousand."""

MAX_ZIPPED = 1 << 30
"""Bytes of a state_dict's file, whose table of contents is read whole."""

SHOWN = 4
"""Differences that an error tells one by one."""

REMEDY = "name a safetensors file, or a state_dict as torch.save writes it since PyTorch 1.6, by --init-from"


class Tensor(NamedTuple):
    """An array in a file, which is not read before it is known to be what is expected."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_params(path: Path, like: Params, image_shape: tuple[int, int, int]) -> Params:
    """The weights in a file, in Flax's names and layouts or in PyTorch's: the names tell.

    Numbers of 16 or 64 bits are accepted, and rounded to float32.

    Args:
        path: a safetensors file, or what ``torch.save(network.state_dict(), path)`` writes; its content tells.
        like: the parameters to be expected, or their shapes.
        image_shape: ``(H, W, C)`` of the images the network takes.

    Returns:
        Float32 arrays.

    Raises:
        UsageError: the file cannot be read, or holds something else than such weights, or weights that are not finite.
    """
    tensors = _open(path)
    in_pytorch = any(name.endswith(".weight") for name in tensors)
    if in_pytorch:
        expected = jax.eval_shape(partial(to_state_dict, image_shape=image_shape), like)
    else:
        expected = flatten_dict(like, sep=".")
    if differences := list(_differences(tensors, expected)):
        more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise UsageError(
            f"{path} does not hold the weights of this network for {'x'.join(map(str, image_shape))} images: "
            f"{', '.join(differences[:SHOWN])}{more}; give weights of the same network by --init-from"
        )
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is found so
        arrays = {name: np.array(tensors[name].read(), np.float32) for name in expected}
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UsageError(f"{path} holds infinite numbers or NaN in {broken[0]}: give other weights")
    return from_state_dict(arrays, image_shape) if in_pytorch else unflatten_dict(arrays, sep=".")


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> Iterable[str]:
    for name, like in expected.items():
        if name not in tensors:
            yield f"{name} {list(like.shape)} is missing"
        elif tensors[name].shape != like.shape:
            yield f"{name} is {reprlib.repr(list(tensors[name].shape))} and should be {list(like.shape)}"
        elif tensors[name].dtype not in FLOATS:
            yield f"{name} is of type {tensors[name].dtype} and should be float32"
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"{reprlib.repr(name)[1:-1]} {reprlib.repr(list(tensor.shape))} is not known"


def _open(path: Path) -> dict[str, Tensor]:
    try:
        if not path.is_file():  # nor a pipe, which might never end
            raise UsageError(f"there is no file {path}: {REMEDY}")
        with path.open("rb") as file:
            begin = file.read(8)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    # PyTorch writes zip archives, whose first bytes would promise exabytes of names if this were safetensors.
    if begin[:2] == b"PK":
        return _open_state_dict(path)
    if len(begin) < 8 or struct.unpack("<Q", begin)[0] > MAX_NAMES:
        raise UsageError(f"{path} holds no weights: {REMEDY}")
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    # The library maps the file into memory, and holds what the header promises against the size of the file.
    try:
        file = safe_open(path, framework="np")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, for it is no mapping
        return {
            name: Tensor(tuple(part.get_shape()), part.get_dtype(), partial(file.get_tensor, name))
            for name, part in parts.items()
        }
    except (SafetensorError, OSError):
        raise UsageError(f"{path} is damaged, or no safetensors file: {REMEDY}") from None


def _open_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ModuleNotFoundError:
        raise UsageError(
            f"{path} is PyTorch's, and reading it needs PyTorch: pip install -e '.[torch]', or give the weights as "
            "safetensors"
        ) from None

    def is_plain(tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
            and not (tensor.is_nested or tensor.is_neg())
        )

    try:
        # Mapped into memory, so that none is taken for numbers before it is known how many they are.
        options = {"map_location": "cpu", "weights_only": True, "mmap": True}
        content = torch.load(path, **options) if _is_plain_archive(path) else None
    except Exception:  # the file may hold anything, and of much PyTorch does not say in its own words what is wrong
        content = None
    if not isinstance(content, dict) or not all(type(k) is str and is_plain(v) for k, v in content.items()):
        raise UsageError(
            f"{path} is damaged, beyond 1 GiB, or no state_dict as torch.save(network.state_dict(), ...) writes it"
        )
    return {
        name: Tensor(tuple(tensor.shape), str(tensor.dtype), lambda tensor=tensor: tensor.detach().float().numpy())
        for name, tensor in content.items()
    }


def _is_plain_archive(path: Path) -> bool:
    """Whether nothing in a zip archive is packed, as PyTorch has it: packed, it might unpack to any size."""
    if path.stat().st_size > MAX_ZIPPED:
        return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    pickles = (member.file_size for member in members if member.filename.endswith(".pkl"))
    return all(member.compress_type == zipfile.ZIP_STORED for member in members) and sum(pickles) <= MAX_NAMES
