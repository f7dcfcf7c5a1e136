"""The weights that ``--init-from`` names: of a run directory, a file, or those that torchvision publishes."""

import hashlib
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax

from cnn_jax import files
from cnn_jax.data.download import fetch
from cnn_jax.errors import UsageError, suggest
from cnn_jax.formats.state_dict import flatten
from cnn_jax.formats.weights import Tensor, Weights, check_torch, open_weights
from cnn_jax.runs.run import load_run

PREFIX = "torchvision:"

DIRECTORY = "weights"
"""The directory of downloaded weights in the user's cache directory."""


class Published(NamedTuple):
    """A published file of weights.

    Attributes:
        url: where it is.
        checksum: the first eight digits of its SHA-256 digest, which its name ends with.
        size: an upper bound of its size in bytes.
    """

    url: str
    checksum: str
    size: int


def _published(name: str, megabytes: int) -> Published:
    stem = PurePosixPath(name).stem
    return Published(f"https://download.pytorch.org/models/{name}", stem.rpartition("-")[2], megabytes << 20)


PUBLISHED = {
    "resnet18": _published("resnet18-f37072fd.pth", 45),
    "resnet34": _published("resnet34-b627a593.pth", 84),
    "resnet50": _published("resnet50-11ad3fa6.pth", 98),
}
"""The default weights of torchvision by model, all trained on ImageNet (``torchvision.models.ResNet50_Weights``)."""


def is_published(init_from: str) -> bool:
    """Whether ``init_from`` names published weights, such as ``torchvision:resnet18``, rather than a path."""
    return init_from.startswith(PREFIX)


def open_pretrained(init_from: str) -> Weights:
    """Open weights to start from, before the dataset is read.

    Args:
        init_from: a run directory, whose newest checkpoint is used; a file, see ``open_weights``; or
            ``torchvision:NAME``, which is downloaded once into the user's cache directory.

    Returns:
        The weights, and the normalization of their input if it is known: that of the run, of the exported file, or
        ImageNet's.

    Raises:
        UsageError: there are no such weights, they cannot be read, or PyTorch is missing.
        CnnJaxError: the download failed, or all checkpoints of the run are damaged.
    """
    if is_published(init_from):
        return replace(open_weights(_download(init_from.removeprefix(PREFIX))), source=init_from)
    path = Path(init_from)
    if not path.is_dir():
        return open_weights(path)
    run = load_run(path)
    tensors = jax.tree.map(Tensor.of, run.state.variables)
    return Weights(init_from, flatten(tensors), run.task.preprocess, run.config.model, run.class_names)


def _download(name: str) -> Path:
    """The file of weights of this name in the user's cache directory, downloaded unless it is there and intact."""
    if name not in PUBLISHED:
        known = ", ".join(f"{PREFIX}{other}" for other in PUBLISHED)
        raise UsageError(f"there are no weights {PREFIX}{name}{suggest(name, PUBLISHED)}; known: {known}")
    published, cache = PUBLISHED[name], files.user_cache()
    path = cache / DIRECTORY / PurePosixPath(published.url).name
    check_torch(f"{PREFIX}{name}")
    if not _is_intact(path, published):
        remedy = "download it by hand, and set --init-from to the file"
        fetch({published.url: published}, cache, DIRECTORY, remedy=remedy)
    return path


def _is_intact(path: Path, published: Published) -> bool:
    try:
        with files.open_data(path, published.size) as file:
            return hashlib.file_digest(file, "sha256").hexdigest().startswith(published.checksum)
    except OSError:
        return False
