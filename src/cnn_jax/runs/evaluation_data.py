"""The data to evaluate a run on: its own, also from a folder that has moved, or another dataset with its classes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, folder
from cnn_jax.data.splits import content_hashes
from cnn_jax.data.streamed import Images
from cnn_jax.errors import CnnJaxError, UsageError
from cnn_jax.runs.run import Run

logger = logging.getLogger("cnn_jax")


def load(
    run: Run, name: str | None = None, *, data_dir: str | Path | None = None, skip_unreadable: bool = False
) -> tuple[Run, Dataset]:
    """Load the data to evaluate a run on.

    A folder with exactly the images of the run's own folder is the run's own, which has moved: its test split is the
    run's. Of any other folder, the test split is that in ``test/``, or else all images. Its images are resized and
    converted to the network's input.

    A warning is logged if test images of another dataset are among the run's training images, or if that cannot be
    checked. The training images are not downloaded for this.

    Args:
        run: the run.
        name: the name of a dataset, as in the config; by default the run's own.
        data_dir: the directory of the dataset, by default the run's.
        skip_unreadable: whether to skip files of a folder that cannot be read as images; they are also skipped if they
            were in training.

    Returns:
        The run, with the new path in its config if its folder has moved; and the dataset, with the network's classes.
        If the name of the dataset is not that in the config, only its test split is meaningful.

    Raises:
        UsageError: the dataset cannot be used, or its images or classes do not match the run.
        CnnJaxError: the dataset is not on disk and cannot be downloaded.
    """
    config = replace(
        run.config,
        dataset=run.config.dataset if name is None else _resolved(name),
        data_dir=run.config.data_dir if data_dir is None else str(data_dir),
        skip_unreadable=skip_unreadable or run.config.skip_unreadable,
    )
    with _each_message_once():
        if config.dataset == run.config.dataset:
            dataset = data.load(config)
        elif _folder_path(config.dataset):
            run, dataset = _load_folder(run, config)
        else:
            # The test split does not depend on the validation split. The run's other settings apply to folders only.
            only_test = replace(config, validation_fraction=0.0, image_size=None, channels=None)
            dataset = data.load(replace(only_test, skip_unreadable=skip_unreadable))
        dataset = run.aligned(dataset)
        if dataset.name != run.config.dataset:
            _warn_of_training_images(run, dataset)
    return run, dataset


def count_shared(images: Images, others: Images) -> int:
    """The number of images that are also among others, with the same pixels.

    Args:
        images: uint8 ``[N, H, W, C]``.
        others: uint8 ``[M, H, W, C]``.
    """
    hashes, known = (content_hashes(map(np.ascontiguousarray, part), 0, "test") for part in (images, others))
    return int(np.isin(hashes, known).sum())


def _folder_path(name: str) -> str:
    """The path of a dataset that is a folder, empty for any other."""
    return name.removeprefix("folder:") if name.startswith("folder:") else ""


def _resolved(name: str) -> str:
    """The name that a dataset has after it is loaded: a folder with its absolute path."""
    path = _folder_path(name)
    return folder.dataset_name(path) if path else name


def _load_folder(run: Run, config: Config) -> tuple[Run, Dataset]:
    """Load a folder with another path than the run's own: the run's data that has moved, or other data."""
    path = _folder_path(config.dataset)
    config = replace(config, image_size=run.image_shape[:2], channels=run.image_shape[2])
    dataset = None
    if _folder_path(run.config.dataset):
        with suppress(UsageError):  # such as too few images of a class to hold out any
            dataset = data.load(config)
    if dataset is not None and dataset.sha256 == run.data_sha256:
        logger.info("%s has the images of the run's own dataset: scoring its test split", dataset.name)
        return replace(run, config=replace(run.config, dataset=dataset.name)), dataset
    if folder.has_splits(path):
        return run, dataset or data.load(replace(config, validation_fraction=0.0))
    # The network was not trained on any of these images, so none is held out.
    return run, folder.load_unsplit(path, config)


def _warn_of_training_images(run: Run, dataset: Dataset) -> None:
    """Warn if test images of another dataset are among the run's training images, or if that is not known."""
    try:
        if not data.is_on_disk(run.config):
            raise CnnJaxError(f"{run.config.dataset} is not in {data.data_dir(run.config)}")
        train = data.load(run.config).train
    except CnnJaxError as error:
        logger.warning("not checked whether the network was trained on test images: %s", error)
        return
    if count := count_shared(dataset.test.images, train.images):
        logger.warning(
            "%d of the %d test images are among the run's training images: the accuracy is too high",
            count,
            len(dataset.test),
        )


@contextmanager
def _each_message_once() -> Iterator[None]:
    """Drop log messages that repeat an earlier one in this context: a folder may have to be read twice."""
    messages = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in messages
        messages.add(message)
        return new

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
