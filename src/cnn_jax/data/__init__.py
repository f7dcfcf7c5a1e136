"""Where the examples come from: named data sets as arrays of uint8 images and int32 labels."""

import logging
import os
from pathlib import Path

from cnn_jax.config import Config
from cnn_jax.data import digits, folder, mnist, tfds
from cnn_jax.data.dataset import Dataset, Split
from cnn_jax.errors import UsageError, suggest
from cnn_jax.files import expanded, user_cache

__all__ = ["Dataset", "Split", "data_dir", "load"]

logger = logging.getLogger("cnn_jax")


def load(config: Config) -> Dataset:
    """The data set that ``config.dataset`` names, from ``data_dir(config)``, the network or a folder of its own.

    ``auto`` is Fashion-MNIST, or scikit-learn's digits where its files are neither on disk nor to be had from
    the network, which is then said in one line; the name of what is returned tells which.

    Raises:
        UsageError: no such data set, files on disk that are not its genuine ones or no images, or settings that it
            does not have.
        CnnJaxError: the files are neither on disk nor to be had.
    """
    directory = data_dir(config)
    if not config.dataset.startswith("folder:"):
        for setting in folder.SETTINGS:
            if getattr(config, setting):
                raise UsageError(f"{setting} is for folder:PATH alone, not for {config.dataset}: leave it out")
    match config.dataset.partition(":"):
        case "auto", "", "":
            try:
                return mnist.load("fashion_mnist", directory)
            except mnist.DownloadError as error:
                logger.warning(
                    "using scikit-learn's digits: Fashion-MNIST is not in %s and cannot be downloaded (%s)",
                    directory,
                    error.cause,
                )
                return digits.load()
        case "digits", "", "":
            return digits.load()
        case name, "", "" if name in mnist.FAMILIES:
            return mnist.load(name, directory)
        case "tfds", ":", name if name:
            return tfds.load(name, directory)
        case "folder", ":", path if path:
            return folder.load(path, config)
    known = ("auto", *mnist.FAMILIES, "digits", "tfds:NAME", "folder:PATH")
    raise UsageError(
        f"unknown data set {config.dataset!r}{suggest(config.dataset, known)}; data sets: {', '.join(known)}"
    )


def data_dir(config: Config) -> Path:
    """Where data sets are kept: the config's, else ``CNN_JAX_DATA_DIR``, else the user's cache directory."""
    given = config.data_dir or os.environ.get("CNN_JAX_DATA_DIR")
    return expanded(given) if given else user_cache()
