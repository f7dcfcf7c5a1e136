"""Image classification datasets of tensorflow-datasets, read without TensorFlow once they are prepared."""

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnn_jax import files
from cnn_jax.config import Config
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.splits import SPLIT_NAMES, TEST_FRACTION, Part, content_hashes, held_out, own_validation
from cnn_jax.data.store import ImageStore
from cnn_jax.errors import CnnJaxError, UsageError, suggest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tensorflow_datasets.core import DatasetBuilder

NAME = re.compile(r"[a-zA-Z]\w*(/[\w+-][\w+.-]*)?(:[\d*]+(\.[\d*]+){2})?", re.ASCII)
"""``name/config:version``. Not the namespaces of tensorflow-datasets, which run code from other sources."""

MAX_FEATURES_BYTES = 1 << 24
"""Maximum size of a ``features.json`` in bytes; genuine ones have a few thousand."""

CACHE_FORMAT = 1
"""Version of the cached images, to be increased when the same records are decoded differently."""


def load(name: str, directory: Path, config: Config) -> Dataset:
    """Read a dataset, preparing it first if necessary, for which TensorFlow must be installed.

    Its ``validation`` split is used for validation only. If it has no ``test`` split, a fifth of its ``train`` split
    is held out for testing. An image is decoded only if the user's cache directory has no image, or no summary of one,
    with the same encoded form; see ``ImageStore``.

    Args:
        name: a name in the catalog, optionally with a config and version, such as ``emnist/letters``; or that of any
            dataset that is prepared in the directory.
        directory: the ``data_dir`` of tensorflow-datasets.
        config: ``cache_limit``, ``validation_fraction`` and ``split_seed`` are used.

    Returns:
        images uint8 ``[N, H, W, C]``, read-only, as those of ``cnn_jax.data.folder.load``; labels int32 ``[N]``. Its
        name is ``tfds:`` and the given name.

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
        published = builder.info.splits
        if "train" not in published:
            raise UsageError(f"tfds:{name} has no train split, only {', '.join(published)}: use another dataset")
        if config.validation_fraction and "validation" in published:
            raise own_validation(f"tfds:{name}")
        splits = [split for split in SPLIT_NAMES if split in published]
        records = _Records(builder, name, splits, image, label)
        class_names = tuple(builder.info.features[label].names)
        with ImageStore(records, config.cache_limit) as store:
            if (unlabeled := np.flatnonzero(records.labels < 0)).size:
                raise UsageError(f"{records.name(unlabeled[0])} has examples without a label: use another dataset")
            selected = {split: np.flatnonzero(records.part == number) for number, split in enumerate(splits)}

            def hold_out(part: Part, fraction: float) -> None:
                train = selected["train"]
                hashes = content_hashes(map(np.ascontiguousarray, store.each(train)), config.split_seed, part)
                mask = held_out(records.labels[train], hashes, fraction, part, class_names, exact=True)
                selected["train"], selected[part] = train[~mask], train[mask]

            if "test" not in selected:
                hold_out("test", TEST_FRACTION)
            if config.validation_fraction:
                hold_out("validation", config.validation_fraction)
            return Dataset(f"tfds:{name}", **store.splits(selected, records.labels), class_names=class_names)


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


class _Records:
    """The images of several splits, as ``cnn_jax.data.store.Encoded``.

    Attributes:
        part: int ``[N]``, the index of each image's split.
        labels: int32 ``[N]``, those of the images that have been read.
    """

    skip_unreadable = False
    remedy = "prepare it again"

    def __init__(self, builder: "DatasetBuilder", name: str, splits: "Sequence[str]", image: str, label: str) -> None:
        import PIL
        import tensorflow_datasets as tfds

        feature = builder.info.features[image]
        self.described = f"tfds:{name}"
        self.settings = ("tfds", CACHE_FORMAT, PIL.__version__, _opencv_version(), feature.shape)
        self._decode = feature.decode_example_np
        self._splits, self._image, self._label = splits, image, label
        self._sources = [
            builder.as_data_source(split, file_format="array_record", decoders={image: tfds.decode.SkipDecoding()})
            for split in splits
        ]
        counts = list(map(len, self._sources))
        self._starts = np.cumsum([0, *counts])
        self.part = np.repeat(np.arange(len(splits)), counts)
        self.labels = np.zeros(len(self.part), np.int32)

    def __len__(self) -> int:
        return len(self.part)

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[io.BytesIO]:
        """See ``Encoded``."""
        part = self.part[number]
        with _reading(self.name(number)):
            record = self._sources[part][int(number - self._starts[part])]
            self.labels[number] = record[self._label]
            file = io.BytesIO(record[self._image])
        file.name = self.name(number)
        yield file

    def decode(self, file: io.BytesIO) -> np.ndarray:
        """See ``Encoded``."""
        with _reading(file.name):
            return self._decode(file.getvalue())

    def name(self, number: int) -> str:
        """See ``Encoded``."""
        return f"the {self._splits[self.part[number]]} split of {self.described}"

    def different_shapes(self, *examples: tuple[int, tuple[int, int, int]]) -> UsageError:
        """See ``Encoded``."""
        (one, first), (other, second) = examples
        described = self.name(one) if self.part[one] == self.part[other] else self.described
        return UsageError(
            f"{described} has images of different shapes, {first} and {second}: use a dataset with images of one shape"
        )


@contextlib.contextmanager
def _reading(described: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # array_record and the image decoders have their own
        raise UsageError(f"{described} cannot be read: {_first_line(error)}") from None


def _opencv_version() -> str | None:
    """The version of OpenCV, with which tensorflow-datasets decodes images if it is installed."""
    return importlib.metadata.version("opencv-python") if importlib.util.find_spec("cv2") else None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
