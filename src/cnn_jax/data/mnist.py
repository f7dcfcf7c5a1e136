"""MNIST and its relatives, as tensorflow-datasets' catalogue knows them: found or fetched, verified, decoded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cnn_jax import files
from cnn_jax.data import idx
from cnn_jax.data.dataset import Dataset, Split
from cnn_jax.data.download import DownloadError, fetch
from cnn_jax.errors import UsageError

if TYPE_CHECKING:
    from tensorflow_datasets.core.download.checksums import UrlInfo

__all__ = ["FAMILIES", "DownloadError", "Family", "family", "load"]

FAMILIES = ("fashion_mnist", "mnist", "kmnist")
PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# The catalogue has the sums of the gzip'd files alone. These are of what they unpack to; of kmnist's none is known.
UNPACKED_SHA256 = {
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "kmnist": (),
}


@dataclass(frozen=True)
class Family:
    """What is known of a data set before any of its files is there.

    Attributes:
        name: the catalogue's.
        class_names: in the order of the labels.
        image_shape: ``(H, W, C)``.
        counts: the numbers of training and of test images.
        urls: the address of each of the four ``PARTS``, gzip'd.
        url_infos: by address, size and sha256 of the gzip'd file.
        unpacked: by sha256 of an unpacked file, the part it is; empty where no sums are known.
    """

    name: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    counts: tuple[int, int]
    urls: Mapping[str, str]
    url_infos: Mapping[str, "UrlInfo"]
    unpacked: Mapping[str, str]

    @property
    def part_of_sha256(self) -> dict[str, str]:
        """The part that a file of a given sha256 is, whether gzip'd or not."""
        return {self.url_infos[url].checksum: part for part, url in self.urls.items()} | dict(self.unpacked)


def family(name: str, directory: Path) -> Family:
    """Ask tensorflow-datasets, which touches neither the network nor TensorFlow for it.

    Args:
        name: one of ``FAMILIES``.
        directory: where data sets are kept.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=directory)
    features = builder.info.features
    return Family(
        name=name,
        class_names=tuple(features["label"].names),
        image_shape=features["image"].shape,
        counts=(60_000, 10_000),
        urls={PurePosixPath(url).stem: url for url in builder.url_infos},
        url_infos=builder.url_infos,
        unpacked=dict(zip(UNPACKED_SHA256[name], PARTS, strict=False)),
    )


def load(name: str, directory: Path) -> Dataset:
    """Read the four files of a family from ``directory`` or ``directory/name``, fetching those that are missing.

    Files lie there gzip'd or plain, under the names they were published by. Where all are there, no network
    is touched.

    Args:
        name: one of ``FAMILIES``.
        directory: where data sets are kept.

    Returns:
        images uint8 ``[N, 28, 28, 1]`` and labels int32 ``[N]``, in the order of the files.

    Raises:
        UsageError: the directory cannot be used, or a file in it is not the genuine one.
        DownloadError: a file is missing and the network does not give it.
        CnnJaxError: the network gave another file than the catalogue's.
    """
    paths = _find(name, directory)
    wanted = family(name, directory)
    owners = {
        sha256: (other, part) for other in FAMILIES for sha256, part in family(other, directory).part_of_sha256.items()
    }
    for part, path in paths.items():
        _verify(path, part, wanted, owners, directory)
    missing = {part: url for part, url in wanted.urls.items() if part not in paths}
    if missing:
        fetch({url: wanted.url_infos[url] for url in missing.values()}, directory, name)
        paths |= {part: directory / name / PurePosixPath(url).name for part, url in missing.items()}
    train, test = (
        _split(paths[images], paths[labels], count, wanted)
        for images, labels, count in zip(PARTS[::2], PARTS[1::2], wanted.counts, strict=True)
    )
    return Dataset(name, train, test, wanted.class_names)


def _find(name: str, directory: Path) -> dict[str, Path]:
    """The parts that are on disk."""
    found = {}
    for folder in (directory, directory / name):  # the family's own folder has the last word
        there = _files(folder)
        for part in PARTS:
            # Some archives of MNIST spell it train-images.idx3-ubyte.
            for spelling in (part.replace("-idx", ".idx"), part, f"{part}.gz"):
                if spelling in there:
                    found[part] = folder / spelling
    return found


def _files(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir() if path.is_file()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UsageError(
            f"cannot read the data directory {directory}: {error.strerror}; give another with --data-dir"
        ) from None


def _verify(path: Path, part: str, wanted: Family, owners: Mapping[str, tuple[str, str]], directory: Path) -> None:
    """Raise ``UsageError`` unless a file is, byte for byte, the part that its name says."""
    try:
        with files.open_data(path, idx.MAX_FILE_BYTES) as file:
            gzipped = idx.is_gzip(file)
            sha256 = hashlib.sha256(file.read(idx.MAX_FILE_BYTES)).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; delete it to have it downloaded") from None
    owner = owners.get(sha256)
    if owner == (wanted.name, part):
        return
    if owner:
        place = directory.joinpath(*owner).with_suffix(".gz" if gzipped else "")
        raise UsageError(f"{path} is {owner[0]}'s {owner[1]}, not {wanted.name}'s {part}; move it to {place}")
    if gzipped or wanted.unpacked:
        raise UsageError(
            f"{path} is damaged or not {wanted.name}'s: its sha256 is not the published file's; "
            "delete it to have it downloaded"
        )


def _split(images_path: Path, labels_path: Path, count: int, wanted: Family) -> Split:
    images, labels = idx.read_images(images_path), idx.read_labels(labels_path)
    if len(images) != len(labels):
        raise UsageError(
            f"{images_path} and {labels_path} do not belong together: "
            f"{len(images)} images, {len(labels)} labels; replace them by the published files"
        )
    if images.shape != (count, *wanted.image_shape):
        raise UsageError(
            f"{images_path} is not {wanted.name}'s: images {images.shape}, "
            f"not {(count, *wanted.image_shape)}; replace it by the published file"
        )
    if labels.max() >= len(wanted.class_names):
        raise UsageError(
            f"{labels_path} is not {wanted.name}'s: label {labels.max()} where there are "
            f"{len(wanted.class_names)} classes; replace it by the published file"
        )
    return Split(images, labels)
