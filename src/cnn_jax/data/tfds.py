"""Image classification datasets of tensorflow-datasets, read without TensorFlow once they are prepared."""

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
from cnn_jax.data.splits import with_test
from cnn_jax.errors import CnnJaxError, UsageError, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorflow_datasets.core import DatasetBuilder

NAME = re.compile(r"[a-zA-Z]\w*(/[\w+-][\w+.-]*)?(:[\d*]+(\.[\d*]+){2})?", re.ASCII)
"""``name/config:version``. Not the namespaces of tensorflow-datasets, which run code from other sources."""

MAX_FEATURES_BYTES = 1 << 24
"""Maximum size of a ``features.json`` in bytes; genuine ones have a few thousand."""

PIECE = 1000
"""Number of examples read at a time: faster than one by one, and images of different sizes are found early."""


def load(name: str, directory: Path, split_seed: int) -> Dataset:
    """Read a dataset, preparing it first if necessary, for which TensorFlow must be installed.

    Its ``validation`` split is used for validation only. If it has no ``test`` split, a fifth of its ``train`` split
    is held out for testing.

    Args:
        name: a name in the catalog, optionally with a config and version, such as ``emnist/letters``; or that of any
            dataset that is prepared in the directory.
        directory: the ``data_dir`` of tensorflow-datasets.
        split_seed: determines, together with their content, which examples are held out.

    Returns:
        images uint8 ``[N, H, W, C]``; labels int32 ``[N]``. Its name is ``tfds:`` and the given name.

    Raises:
        UsageError: there is no such dataset, it does not consist of labeled images of one size, or it cannot be read.
        CnnJaxError: preparing it failed.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"tfds:{name} is not of the form tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION")
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
                f"tfds:{name} in {builder.data_dir} has the format {', '.join(form.value for form in formats)}, not "
                'array_record: prepare it in another --data-dir with download_and_prepare(file_format="array_record")'
            )
        splits = builder.info.splits
        if "train" not in splits:
            raise UsageError(f"tfds:{name} has no train split, only {', '.join(splits)}: use another dataset")

        def read(split: str) -> Split:
            source = builder.as_data_source(split, file_format="array_record")
            return _read(source, image, label, f"the {split} split of tfds:{name}")

        class_names = tuple(builder.info.features[label].names)
        train = read("train")
        validation = read("validation") if "validation" in splits else None
        train, test = (train, read("test")) if "test" in splits else with_test(train, split_seed, class_names)
    return Dataset(f"tfds:{name}", train, test, class_names, validation)


def is_on_disk(name: str, directory: Path) -> bool:
    """Whether a dataset has been prepared in ``directory``; True also for what cannot be a dataset's name."""
    if not NAME.fullmatch(name):
        return True
    with _quiet():
        _check_features(name, directory)  # before the builder, which would run others
        return _builder(name, directory).is_prepared()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the advice of tensorflow-datasets to install OpenCV and the like."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_features(name: str, directory: Path) -> None:
    """Check that a prepared dataset uses features of tensorflow-datasets only, since it would import and run any other.

    All configs and versions are checked, because tensorflow-datasets chooses among them.

    Raises:
        UsageError: a file names another feature, or cannot be read.
    """
    from tensorflow_datasets.core.naming import camelcase_to_snakecase

    folder = directory / camelcase_to_snakecase(re.split("[/:]", name)[0])
    try:
        default = json.loads(_text(folder / ".config" / "metadata.json") or "{}").get("default_config_name")
        if default and not NAME.fullmatch(f"a/{default}"):
            raise ValueError(f"{default!r} is not the name of a config")
        versions = _subfolders(folder)
        versions += itertools.chain.from_iterable(map(_subfolders, versions))  # those of configs
        for path in (version / "features.json" for version in versions):
            for feature in _feature_types(json.loads(_text(path) or "{}")):
                if not str(feature).startswith("tensorflow_datasets."):
                    raise UsageError(
                        f"{path} names {str(feature)[:100]!r}, which is not a feature of tensorflow-datasets and would "
                        "run as a program: prepare the dataset again with features of tensorflow-datasets"
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
    """Everything that tensorflow-datasets could interpret as the name of a feature's class."""
    remaining = [content]
    while remaining:
        match remaining.pop():
            case dict() as mapping:
                for key, value in mapping.items():
                    # The older format uses the key "type", which can also be the name of a feature.
                    if key in ("pythonClassName", "python_class_name") or (key == "type" and isinstance(value, str)):
                        yield value
                    elif key in ("json", "content") and isinstance(value, str):
                        with contextlib.suppress(ValueError):  # not JSON
                            remaining.append(json.loads(value))
                    else:
                        remaining.append(value)
            case list() as items:
                remaining.extend(items)


def _builder(name: str, directory: Path) -> "DatasetBuilder":
    import tensorflow_datasets as tfds

    try:
        # Datasets print long messages about dependencies that are not installed.
        with contextlib.redirect_stdout(io.StringIO()):
            return tfds.builder(name, data_dir=directory)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UsageError(
            f"tensorflow-datasets has no dataset {name!r}{suggest(name, known)}; "
            "see https://www.tensorflow.org/datasets/catalog"
        ) from None
    except Exception as error:  # datasets run their own code
        # Without the arguments repeated before the reason, and the introduction of an empty list.
        reason = _first_line(error).rpartition('}": ')[2].partition(" Here are ")[0].rstrip(".")
        raise UsageError(
            f"tfds:{name} cannot be used: {reason}; see https://www.tensorflow.org/datasets/catalog"
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
    raise UsageError(f"tfds:{name} is not a dataset of 8-bit images with one class each: use another dataset")


def _prepare(builder: "DatasetBuilder", name: str) -> None:
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError(
            f"tfds:{name} is not prepared in {builder.data_dir}, and preparing it requires TensorFlow: "
            "pip install -e '.[tfds]', or use the --data-dir in which it is prepared"
        )
    tfds.display_progress_bar(sys.stderr.isatty())
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # datasets run their own code
        raise CnnJaxError(f"tfds:{name} cannot be prepared: {_first_line(error)}") from None


def _read(source: "Sequence[dict[str, Any]]", image: str, label: str, described: str) -> Split:
    examples = _examples(source, described)
    first = next(examples)  # tensorflow-datasets does not prepare empty splits
    shape = first[image].shape
    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for index, example in enumerate(itertools.chain([first], examples)):
        if example[image].shape != shape:
            raise UsageError(
                f"{described} has images of different shapes, {shape} and {example[image].shape}: "
                "use a dataset with images of one shape"
            )
        images[index], labels[index] = example[image], example[label]
    if labels.min() < 0:
        raise UsageError(f"{described} has examples without a label: use another dataset")
    return Split(images, labels)


def _examples(source: "Sequence[dict[str, Any]]", described: str) -> Iterator[dict[str, Any]]:
    try:
        for start in range(0, len(source), PIECE):
            yield from source.__getitems__(range(start, min(start + PIECE, len(source))))
    except Exception as error:  # array_record and the image decoders have their own
        raise UsageError(f"{described} cannot be read: {_first_line(error)}; prepare it again") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
