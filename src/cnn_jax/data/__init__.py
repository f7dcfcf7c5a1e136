"""Datasets by name, or from arrays: uint8 images and int32 labels in two or three splits."""

import logging
import os
from pathlib import Path

from cnn_jax.config import Config
from cnn_jax.data import digits, folder, mnist, tfds
from cnn_jax.data.dataset import Dataset, Split
from cnn_jax.data.splits import with_validation
from cnn_jax.errors import UsageError, suggest
from cnn_jax.files import expanded, user_cache

__all__ = ["Dataset", "Split", "data_dir", "load", "with_validation"]

logger = logging.getLogger("cnn_jax")


def load(config: Config) -> Dataset:
    """The dataset ``config.dataset``, from ``data_dir(config)``, the network or its own folder.

    ``auto`` is Fashion-MNIST, or scikit-learn's digits with a warning if Fashion-MNIST is neither on disk nor can be
    downloaded; the name of the result says which. The validation split is the dataset's own, or held out of its
    training split if ``config.validation_fraction`` is above 0.

    Raises:
        UsageError: there is no such dataset, its files are damaged or unsuitable, or a setting does not apply to it.
        CnnJaxError: the files are not on disk and cannot be downloaded.
    """
    kind, _, path = config.dataset.partition(":")
    if kind == "folder" and path:
        return folder.load(path, config)
    _check_known(config.dataset)
    for setting in folder.SETTINGS:
        if getattr(config, setting) and kind != "folder":
            flag = f"--{setting.replace('_', '-')}"
            raise UsageError(f"{flag} applies to folder:PATH only, not to {config.dataset}: leave it out")
    if kind == "tfds":
        return tfds.load(path, data_dir(config), config)
    dataset = _load(config.dataset, data_dir(config))
    return with_validation(dataset, config.validation_fraction, config.split_seed)


def is_on_disk(config: Config) -> bool:
    """Whether ``load`` downloads nothing; True also if there is no such dataset."""
    name, directory = config.dataset, data_dir(config)
    if name in mnist.FAMILIES:
        return mnist.is_on_disk(name, directory)
    return tfds.is_on_disk(name.removeprefix("tfds:"), directory) if name.startswith("tfds:") else True


def _load(name: str, directory: Path) -> Dataset:
    if name == "auto":
        try:
            return mnist.load("fashion_mnist", directory)
        except mnist.DownloadError as error:
            logger.warning(
                "using scikit-learn's digits: Fashion-MNIST is not in %s and cannot be downloaded (%s)",
                directory,
                error.cause,
            )
            return digits.load()
    if name == "digits":
        return digits.load()
    return mnist.load(name, directory)


def _check_known(name: str) -> None:
    if name in ("auto", "digits", *mnist.FAMILIES) or (name.startswith("tfds:") and name != "tfds:"):
        return
    known = ("auto", *mnist.FAMILIES, "digits", "tfds:NAME", "folder:PATH")
    is_path = Path(name).is_dir() or (Path(name).suffix.lower() == ".csv" and Path(name).is_file())
    suggestion = f"; did you mean 'folder:{name}'?" if is_path else suggest(name, known)
    raise UsageError(f"unknown dataset {name!r}{suggestion}; datasets: {', '.join(known)}")


def data_dir(config: Config) -> Path:
    """The directory of downloaded datasets: ``config.data_dir``, ``CNN_JAX_DATA_DIR``, or the user's cache directory.

    The first one that is set is used.
    """
    directory = config.data_dir or os.environ.get("CNN_JAX_DATA_DIR")
    return expanded(directory) if directory else user_cache()
