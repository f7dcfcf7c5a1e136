"""Reading initial weights from a safetensors file or a PyTorch state_dict, without executing code from the file.

``open_weights`` reads the names, shapes and normalization, which are needed before the dataset is read and the network
is created; ``Weights.variables`` reads the rest into the network.
"""

import importlib.util
import json
import logging
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from cnn_jax.errors import UsageError
from cnn_jax.formats import state_dict as layouts
from cnn_jax.models import MODELS
from cnn_jax.training.state import Variables
from cnn_jax.training.task import Normalize

FLOATS = {"F16", "BF16", "F32", "F64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64"}
"""Accepted dtypes of weights, as named by safetensors and by PyTorch."""

MAX_NAMES = 1 << 20
"""Maximum size of the names and shapes in a file in bytes; the largest networks need about a hundred thousand."""

MAX_STATE_DICT = 1 << 30
"""Maximum size of a state_dict file in bytes, because its table of contents, or all of it, is read into memory."""

MAX_SHOWN = 4
"""Maximum number of differences to list in an error message."""

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""The names under which training scripts save a state_dict along with other values."""

WRAPPERS = ("module.", "_orig_mod.")
"""The prefixes that ``torch.nn.DataParallel`` and ``torch.compile`` add to the names of weights."""

ZIP = b"PK"
"""The first bytes of a state_dict saved by PyTorch 1.6 or later."""

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF"
"""The first bytes of a state_dict saved by earlier versions, such as the published weights of many networks.

The file is five pickles (this magic number, a version, the machine's number sizes, the names and shapes, the keys of
the arrays), then the arrays.
"""

REMEDY = "set --init-from to a run directory, a safetensors file, or a state_dict saved by PyTorch"

IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""The input of the ResNets of torchvision, and of timm by default (``torchvision.transforms._presets``)."""

RESNET_NAMES = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.bn1.weight", "fc.weight"}
"""Some of the names in the state_dicts of the ResNets of torchvision and timm."""

logger = logging.getLogger("cnn_jax")


class Tensor(NamedTuple):
    """An array in a file, which is read only after its shape and dtype have been checked."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        """A float32 array in memory."""
        return cls(array.shape, "F32", lambda: np.asarray(array))


@dataclass(frozen=True)
class Weights:
    """Weights to start from, of which only the names and shapes have been read.

    Attributes:
        source: where they come from, for error messages.
        tensors: the weights by Flax's or PyTorch's names.
        preprocess: the conversion of images to the input that they were trained with, or None if it is not known.
        model: the architecture's name, or None if it is not known.
        class_names: the classes of the logits, or None if they are not known.
    """

    source: str
    tensors: Mapping[str, Tensor]
    preprocess: Normalize | None = None
    model: str | None = None
    class_names: tuple[str, ...] | None = None

    def variables(
        self,
        model: str,
        target: Variables,
        image_shape: tuple[int, int, int],
        class_names: tuple[str, ...] | None = None,
    ) -> Variables:
        """Read the weights into the variables of a network, from 16, 32 or 64 bits.

        The weights of the model's last layer, its head, are those of ``target`` if only the number or the names of the
        classes differ, and a line is logged.

        Args:
            model: the architecture's name.
            target: the expected variables, such as ``params`` and ``batch_stats``, or their shapes.
            image_shape: ``(H, W, C)`` of the network's input images.
            class_names: the classes of the dataset; None if their names do not matter.

        Returns:
            The same collections as in ``target``, float32 in host memory except for a head of ``target``.

        Raises:
            UsageError: the weights do not match ``target``, or they are not finite.
        """
        if self.model not in (None, model):
            raise UsageError(f"the weights in {self.source} are for the network {self.model}: use --model {self.model}")
        in_pytorch = any(name.endswith(".weight") for name in self.tensors)
        flattened = layouts.flattened_layers(model, image_shape)
        own = expected = layouts.flatten(target)
        tensors = self.tensors
        if in_pytorch:
            expected = jax.eval_shape(partial(layouts.to_state_dict, flattened=flattened), expected)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
        head = MODELS[model].HEAD
        classes = _other_classes(tensors, expected, head)
        renamed = None not in (self.class_names, class_names) and self.class_names != class_names
        if classes or renamed:
            expected, tensors = (_without(arrays, head) for arrays in (expected, tensors))
        self._check(tensors, expected, image_shape)
        arrays = {name: self._read(name) for name in expected}
        if in_pytorch:
            arrays = layouts.from_state_dict(arrays, flattened)
        if classes:
            kept, given = classes
            logger.info("the head %s is new: the weights are for %d classes, the dataset has %d", head, given, kept)
        elif renamed:
            logger.info("the head %s is new: the weights are for other classes than those of the dataset", head)
        return layouts.unflatten({**own, **arrays}, target)

    def _check(
        self, tensors: Mapping[str, Tensor], expected: Mapping[str, Any], image_shape: tuple[int, int, int]
    ) -> None:
        """Raise UsageError unless the names, shapes and dtypes are the expected ones, and the channels match."""
        channels = image_shape[2]
        if differences := list(_differences(tensors, expected)):
            more = f", and {len(differences) - MAX_SHOWN} more" if len(differences) > MAX_SHOWN else ""
            raise UsageError(
                f"the weights in {self.source} do not match this network for {'x'.join(map(str, image_shape))} images: "
                f"{', '.join(differences[:MAX_SHOWN])}{more}; {_remedy(tensors, expected, channels)}"
            )
        if self.preprocess is not None and len(self.preprocess.mean) not in (1, channels):
            raise UsageError(
                f"the mean and std in {self.source} are for images of {len(self.preprocess.mean)} channels, not "
                f"{channels}: set --init-from to other weights"
            )

    def _read(self, name: str) -> np.ndarray:
        """Read an array as float32. Raises UsageError if it is not finite, or is a negative variance."""
        with np.errstate(over="ignore"):  # values too large for float32 become infinite
            array = np.array(self.tensors[name].read(), np.float32)
        if not np.isfinite(array).all():
            raise UsageError(f"{name} in {self.source} contains infinity or NaN: set --init-from to other weights")
        if name.endswith((".var", ".running_var")) and (array < 0).any():
            raise UsageError(f"{name} in {self.source} contains negative numbers: set --init-from to other weights")
        return array


def open_weights(path: Path) -> Weights:
    """Read the names, shapes and dtypes of the weights in a file, and the normalization of their input.

    The normalization is that in the metadata of a file written by ``export``, and ImageNet's for a ResNet with
    PyTorch's names. It is not known for others.

    Args:
        path: a safetensors file, or one written by ``torch.save(network.state_dict(), path)``; with Flax's or PyTorch's
            names and layouts.

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
    # As the length of a safetensors header, the signatures of PyTorch's files would be far above the maximum.
    if header.startswith((ZIP, LEGACY)):
        tensors, metadata = _open_state_dict(path, is_zip=header.startswith(ZIP)), {}
    elif len(header) < 8 or struct.unpack("<Q", header)[0] > MAX_NAMES:
        raise UsageError(f"{path} contains no weights: {REMEDY}")
    else:
        tensors, metadata = _open_safetensors(path)
    preprocess = _normalization(metadata) or _published_normalization(tensors)
    return Weights(str(path), tensors, preprocess, _model(metadata), _class_names(metadata))


def check_torch(source: object) -> None:
    """Raise UsageError unless PyTorch is installed, which reads the state_dict ``source``."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            f"reading the state_dict {source} needs PyTorch: pip install -e '.[torch]', or set --init-from to a "
            "safetensors file"
        )


def _other_classes(tensors: Mapping[str, Tensor], expected: Mapping[str, Any], head: str) -> tuple[int, int] | None:
    """The expected number of classes and that of the weights, if the shapes of the head differ in nothing else."""
    bias, names = f"{head}.bias", (f"{head}.bias", f"{head}.kernel", f"{head}.weight")
    names = [name for name in names if name in expected]
    if bias not in names or not all(name in tensors and tensors[name].dtype in FLOATS for name in names):
        return None
    given, (wanted,) = tensors[bias].shape, expected[bias].shape
    if len(given) != 1 or given[0] in (0, wanted):
        return None
    for name in names:
        axis = -1 if name.endswith(".kernel") else 0
        shape = list(expected[name].shape)
        shape[axis] = given[0]
        if tensors[name].shape != tuple(shape):
            return None
    return wanted, given[0]


def _without(arrays: Mapping[str, Any], layer: str) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if name.rpartition(".")[0] != layer}


def _remedy(tensors: Mapping[str, Tensor], expected: Mapping[str, Any], channels: int) -> str:
    """What to do about differences: about the dataset's channels if a convolution of the input differs in these."""
    kinds = {1: "gray", 3: "color"}
    for name, target in expected.items():
        axis = 2 if name.endswith(".kernel") else 1
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) == len(target.shape) == 4 and target.shape[axis] == channels != shape[axis] in kinds:
            return f"the weights are for {kinds[shape[axis]]} images: use --channels {shape[axis]}"
    return "set --init-from to weights of the same network"


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


def _model(metadata: Mapping[str, str]) -> str | None:
    """The model's name in the metadata of a safetensors file, or None if there is none that is known."""
    return metadata.get("model") if metadata.get("model") in MODELS else None


def _class_names(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The class names in the metadata of a safetensors file, or None if there are none."""
    try:
        names = json.loads(metadata.get("class_names", ""))
    except (ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _normalization(metadata: Mapping[str, str]) -> Normalize | None:
    """The mean and std in the metadata of a safetensors file, or None if there are none that can be used."""
    mean, std = (_numbers(metadata.get(name, "")) for name in ("mean", "std"))
    if mean is None or std is None or len(mean) != len(std) or len(mean) not in (1, 3):
        return None
    with np.errstate(over="ignore"):
        values = np.float32([mean, std])
    return Normalize(mean, std) if np.isfinite(values).all() and (values[1] > 0).all() else None


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        values = json.loads(text)
        if isinstance(values, list) and all(type(value) in (int, float) for value in values):
            return tuple(map(float, values))
    except (ValueError, OverflowError, RecursionError):
        pass
    return None


def _published_normalization(tensors: Mapping[str, Tensor]) -> Normalize | None:
    """ImageNet's for the state_dict of a ResNet of torchvision or timm for color images; None for others."""
    is_resnet = tensors.keys() >= RESNET_NAMES and tensors["conv1.weight"].shape[1:2] == (3,)
    return IMAGENET if is_resnet else None


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    # The library maps the file into memory and checks the header against the size of the file.
    try:
        file = safe_open(path, framework="np")
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        tensors = {
            name: Tensor(tuple(part.get_shape()), part.get_dtype(), partial(file.get_tensor, name))
            for name, part in parts.items()
        }
        return tensors, file.metadata() or {}
    except (SafetensorError, OSError):
        raise UsageError(f"{path} is damaged or not a safetensors file: {REMEDY}") from None


def _open_state_dict(path: Path, is_zip: bool) -> dict[str, Tensor]:
    check_torch(path)
    import torch

    def is_plain(tensor: Any) -> bool:
        return (
            isinstance(tensor, torch.Tensor)
            and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
            and not (tensor.is_nested or tensor.is_neg())
        )

    try:
        # An archive is memory-mapped, so that no memory is allocated before the shapes have been checked.
        options = {"map_location": "cpu", "weights_only": True, "mmap": is_zip}
        can_be_read = path.stat().st_size <= MAX_STATE_DICT and (_is_plain_archive if is_zip else _is_short)(path)
        content = torch.load(path, **options) if can_be_read else None
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
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    pickles = (member.file_size for member in members if member.filename.endswith(".pkl"))
    return all(member.compress_type == zipfile.ZIP_STORED for member in members) and sum(pickles) <= MAX_NAMES


def _is_short(path: Path) -> bool:
    """Whether the names and shapes in a file of PyTorch's legacy format are of the usual size: not many for the arrays.

    Raises:
        ValueError: they are not, or the file is damaged.
    """
    with path.open("rb") as file:
        start = BytesIO(file.read(MAX_NAMES))
    for _ in range(5):
        for _ in pickletools.genops(start):  # nothing is executed
            pass
    return True
