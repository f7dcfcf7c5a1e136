"""Any other image-classification data set of tensorflow-datasets, read as it prepared it, without TensorFlow."""

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_jax import files
from cnn_jax.data.dataset import Dataset, Split
from cnn_jax.data.splits import hold_out
from cnn_jax.errors import CnnJaxError, UsageError, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorflow_datasets.core import DatasetBuilder

NAME = re.compile(r"[a-zA-Z]\w*(/[\w+-][\w+.-]*)?(:[\d*]+(\.[\d*]+){2})?", re.ASCII)
"""``name/configuration:version``; tensorflow-datasets also takes namespaces, by which it runs code from elsewhere."""

MAX_FEATURES_BYTES = 1 << 24
"""Of a ``features.json``; those of the catalogue have some thousands."""

PIECE = 1000
"""Examples read at once: faster than one by one, and few enough to notice early that images differ in size."""


def load(name: str, directory: Path) -> Dataset:
    """Read a data set, preparing it first where it is not and TensorFlow is installed.

    The test split is its ``test``, else its ``validation``, else a fixed fifth of its ``train``.

    Args:
        name: the catalogue's, with a configuration and version where wanted: ``emnist/letters``; or that of
            any data set that lies prepared in the directory.
        directory: tensorflow-datasets' ``data_dir``.

    Returns:
        images uint8 ``[N, H, W, C]``; labels int32 ``[N]``. Its name is ``tfds:`` and the one given.

    Raises:
        UsageError: no such data set, not one of equally large classified images, or not readable here.
        CnnJaxError: preparing it failed.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"tfds:{name} cannot be used: give tfds:NAME, tfds:NAME/CONFIGURATION or tfds:NAME:VERSION")
    import tensorflow_datasets as tfds

    with _quiet():
        _check_features(name, directory)
        builder = _builder(name, directory)
        image, label = _features(builder, name)
        if not builder.is_prepared():
            _prepare(builder, name)
        formats = builder.info.available_file_formats()
        if tfds.core.FileFormat.ARRAY_RECORD not in formats:
            raise UsageError(
                f"tfds:{name} lies in {builder.data_dir} as {', '.join(form.value for form in formats)}, not as "
                'array_record; prepare it in another --data-dir by download_and_prepare(file_format="array_record")'
            )
        splits = builder.info.splits
        if "train" not in splits:
            raise UsageError(f"tfds:{name} has no training split, only {', '.join(splits)}; choose another")

        def read(split: str) -> Split:
            source = builder.as_data_source(split, file_format="array_record")
            return _read(source, image, label, f"the {split} split of tfds:{name}")

        train = read("train")
        held_out = next((split for split in ("test", "validation") if split in splits), None)
        train, test = (train, read(held_out)) if held_out else hold_out(train.images, train.labels)
    return Dataset(f"tfds:{name}", train, test, tuple(builder.info.features[label].names))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep tensorflow-datasets from advising on standard error to install OpenCV and the like."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_features(name: str, directory: Path) -> None:
    """Refuse prepared data sets whose features are not tensorflow-datasets' own: it would import, and so run, anything.

    Those of all configurations and versions are checked, since which of them is meant is for it to say.

    Raises:
        UsageError: a file names such a feature, or cannot be read.
    """
    from tensorflow_datasets.core.naming import camelcase_to_snakecase

    folder = directory / camelcase_to_snakecase(re.split("[/:]", name)[0])
    try:
        default = json.loads(_text(folder / ".config" / "metadata.json") or "{}").get("default_config_name")
        if default and not NAME.fullmatch(f"a/{default}"):
            raise ValueError(f"{default!r} is not the name of a configuration")
        versions = _subfolders(folder)
        versions += itertools.chain.from_iterable(map(_subfolders, versions))  # those of configurations
        for path in (version / "features.json" for version in versions):
            for feature in _feature_types(json.loads(_text(path) or "{}")):
                if not str(feature).startswith("tensorflow_datasets."):
                    raise UsageError(
                        f"{path} names {str(feature)[:100]!r}, which is not a feature of tensorflow-datasets: it would "
                        "be run as a program; prepare the data set again with features of tensorflow-datasets"
                    )
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"tfds:{name} cannot be read from {folder}: {_first_line(error)}; prepare it again") from None


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _text(path: Path) -> str | None:
    try:
        with files.open_data(path, MAX_FEATURES_BYTES) as file:
            return file.read(MAX_FEATURES_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _feature_types(content: object) -> Iterator[object]:
    """Everything that tensorflow-datasets may take for the name of a feature's class."""
    remaining = [content]
    while remaining:
        match remaining.pop():
            case dict() as mapping:
                for key, value in mapping.items():
                    # In the older form it is called "type", as a feature itself may be.
                    if key in ("pythonClassName", "python_class_name") or (key == "type" and isinstance(value, str)):
                        yield value
                    elif key in ("json", "content") and isinstance(value, str):
                        with contextlib.suppress(ValueError):  # what is no JSON is not read as such
                            remaining.append(json.loads(value))
                    else:
                        remaining.append(value)
            case list() as items:
                remaining.extend(items)


def _builder(name: str, directory: Path) -> "DatasetBuilder":
    import tensorflow_datasets as tfds

    try:
        # What a data set needs and is not installed it announces on standard output, at length.
        with contextlib.redirect_stdout(io.StringIO()):
            return tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UsageError(
            f"tensorflow-datasets has no data set {name!r}{suggest(name, known)}; "
            "see https://www.tensorflow.org/datasets/catalog"
        ) from None
    except Exception as error:  # each data set runs code of its own
        # Without the arguments repeated before what is wrong, and the announcement of a list that is empty.
        wrong = _first_line(error).rpartition('}": ')[2].partition(" Here are ")[0].rstrip(".")
        raise UsageError(
            f"tfds:{name} cannot be used: {wrong}; see https://www.tensorflow.org/datasets/catalog"
        ) from None


def _features(builder: "DatasetBuilder", name: str) -> tuple[str, str]:
    """The names of the image and of its label within an example."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    if isinstance(features, tfds.features.FeaturesDict):
        images = [
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8
        ]
        labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
        supervised = tuple(builder.info.supervised_keys or ())[:2]
        if len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
            return supervised
        if len(images) == len(labels) == 1:
            return images[0], labels[0]
    raise UsageError(f"tfds:{name} is not a data set of 8-bit images with one class each; choose another")


def _prepare(builder: "DatasetBuilder", name: str) -> None:
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError(
            f"tfds:{name} is not prepared in {builder.data_dir}, and preparing it needs TensorFlow: "
            "pip install -e '.[tfds]', or give the --data-dir where it lies prepared"
        )
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # each data set runs code of its own
        raise CnnJaxError(f"tfds:{name} cannot be prepared: {_first_line(error)}") from None


def _read(source: "Sequence[dict[str, Any]]", image: str, label: str, described: str) -> Split:
    examples = _examples(source, described)
    first = next(examples)  # tensorflow-datasets refuses to prepare an empty split
    shape = first[image].shape
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for index, example in enumerate(itertools.chain([first], examples)):
        if example[image].shape != shape:
            raise UsageError(
                f"{described} has images of differing sizes, {shape} and {example[image].shape}; "
                "choose a data set whose images are all alike"
            )
        images[index], labels[index] = example[image], example[label]
    if labels.min() < 0:
        raise UsageError(f"{described} has examples without a label; choose another data set")
    return Split(images, labels)


def _examples(source: "Sequence[dict[str, Any]]", described: str) -> Iterator[dict[str, Any]]:
    try:
        for start in range(0, len(source), PIECE):
            yield from source.__getitems__(range(start, min(start + PIECE, len(source))))
    except Exception as error:  # array_record and the image decoders each have their own
        raise UsageError(f"{described} cannot be read: {_first_line(error)}; prepare it again") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
