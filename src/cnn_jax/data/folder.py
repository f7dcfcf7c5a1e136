"""A dataset of image files, in a folder for each class or listed in a CSV file."""

import contextlib
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path

import numpy as np

from cnn_jax.config import Config
from cnn_jax.data import layout
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.image import opened, read_image
from cnn_jax.data.splits import TEST_FRACTION, Part, content_hashes, held_out, own_validation
from cnn_jax.data.store import ImageStore
from cnn_jax.errors import UsageError
from cnn_jax.files import expanded

SETTINGS = ("image_size", "channels", "skip_unreadable")
"""Fields of the config that apply to folders only. ``fit`` applies to prediction with any dataset too."""

CACHE_FORMAT = 3
"""Version of the cached images, to be increased when the same files are decoded differently."""


def load(path: str, config: Config) -> Dataset:
    """Read the image files of a folder or of a CSV file, as listed by ``cnn_jax.data.layout.list_images``.

    One that ``read_image`` cannot read counts as an unreadable image. Every file is read once. It is decoded only if
    the user's cache directory has no image, or summary of one, from a file with the same content; see ``ImageStore``.

    Without splits, a fifth of the images is held out for testing, and ``validation_fraction`` of the training images
    for validation. Which ones depends on the content of the files and ``split_seed``; see ``cnn_jax.data.splits``.

    The images for training, and those held out of them, are in the order of their files' SHA-256 digests, which mixes
    the classes. Those of ``val`` and ``test`` are in the order of the classes and file names. So the result is the same
    for the same images in folders, in a CSV file, and in one with its rows in another order.

    Args:
        path: the folder or CSV file.
        config: ``SETTINGS``, ``fit``, ``cache_limit``, ``validation_fraction`` and ``split_seed`` are used.

    Returns:
        images uint8 ``[N, H, W, C]``, read-only, all splits in one array that is mapped from the cache, or in memory if
        that cannot be written, or ``StreamedImages``; labels int32 ``[N]``, in the order of the sorted names of the
        classes. The name is ``folder:`` and the absolute path.

    Raises:
        UsageError: there are no images of several classes, or files that cannot be read.
    """
    listing = layout.list_images(_root(path))
    if config.validation_fraction and "validation" in listing.splits:
        raise own_validation(dataset_name(path))
    with _read(listing, config, min_images=1 if len(listing.splits) > 1 else 2) as store:
        part, labels = np.divmod(listing.group, np.int32(len(listing.class_names)))
        selected = {split: np.flatnonzero(store.readable & (part == n)) for n, split in enumerate(listing.splits)}
        # In the order of the classes, training with --no-shuffle would end with many steps on the last class only.
        selected["train"] = selected["train"][np.argsort(store.digests[selected["train"]], kind="stable")]

        def hold_out(split: Part, fraction: float) -> None:
            train = selected["train"]
            hashes = content_hashes(store.digests[train], config.split_seed, split)
            mask = held_out(labels[train], hashes, fraction, split, listing.class_names, exact=False)
            selected["train"], selected[split] = train[~mask], train[mask]

        if "test" not in selected:
            hold_out("test", TEST_FRACTION)
        if config.validation_fraction:
            hold_out("validation", config.validation_fraction)
        splits = store.splits(selected, labels, _names(listing))
    return Dataset(dataset_name(path), **splits, class_names=listing.class_names)


def load_unsplit(path: str, config: Config) -> Dataset:
    """Read images without splits and hold nothing out: all images are in the test split, and in ``train``.

    This is for evaluating a network that was not trained on them. See ``load``.
    """
    listing = layout.list_images(_root(path))
    with _read(listing, config, min_images=1) as store:
        labels = listing.group % np.int32(len(listing.class_names))
        split = store.splits({"test": np.flatnonzero(store.readable)}, labels, _names(listing))["test"]
    return Dataset(dataset_name(path), split, split, listing.class_names)


def dataset_name(path: str) -> str:
    """The name of the dataset of a folder or CSV file."""
    return f"folder:{_root(path)}"


def has_splits(path: str) -> bool:
    """Whether the images of a folder or CSV file are split already. Raises ``UsageError`` if it cannot be read."""
    return layout.has_splits(_root(path))


def _root(path: str) -> Path:
    return expanded(path).absolute()


def _read(listing: layout.Listing, config: Config, min_images: int) -> ImageStore:
    """Read all files, of which every class must have a number of images in every split."""
    _check_counts(listing, listing.group, min_images)
    store = ImageStore(_Files(listing, config), config.cache_limit)
    with contextlib.ExitStack() as on_error:
        on_error.push(store)
        _check_counts(listing, listing.group[store.readable], min_images)
        on_error.pop_all()
    return store


def _names(listing: layout.Listing) -> np.ndarray:
    """The path of each file within the folder, str objects ``[N]``."""
    # As objects: numpy would strip null bytes from the end.
    return np.array([str(path.relative_to(listing.root)) for path in listing.paths], object)


class _Files:
    """The files of a dataset's images, as ``cnn_jax.data.store.Encoded``."""

    remedy = "remove it or use --skip-unreadable"

    def __init__(self, listing: layout.Listing, config: Config) -> None:
        import PIL

        fit = config.image_size and config.fit  # it does not matter without a size
        self.described = str(listing.source)
        self.settings = (CACHE_FORMAT, PIL.__version__, config.image_size, fit, config.channels)
        self.skip_unreadable = config.skip_unreadable
        self._listing = listing
        self._config = config

    def __len__(self) -> int:
        return len(self._listing.paths)

    def opened(self, number: int) -> AbstractContextManager[BytesIO]:
        return opened(self._listing.paths[number])

    def decode(self, file: BytesIO) -> np.ndarray:
        return read_image(file, self._config.image_size, self._config.channels, self._config.fit)

    def name(self, number: int) -> str:
        return str(self._listing.paths[number])

    def different_shapes(self, *examples: tuple[int, tuple[int, int, int]]) -> UsageError:
        one, other = (
            f"{height}x{width} ({self._listing.paths[number].relative_to(self._listing.root)})"
            for number, (height, width, _) in examples
        )
        return UsageError(
            f"the images of {self.described} differ in height and width, such as {one} and {other}: use --image-size "
            "to resize them, such as --image-size 64 64"
        )


def _check_counts(listing: layout.Listing, group: np.ndarray, min_images: int) -> None:
    for name, count in zip(listing.groups, np.bincount(group, minlength=len(listing.groups)), strict=True):
        if count < min_images:
            images = "1 readable image" if count == 1 else f"{count or 'no'} readable images"
            raise UsageError(
                f"{name} has {images}: every class needs at least {min_images}"
                + (", one of them to be held out for testing" if min_images == 2 else "")
            )
