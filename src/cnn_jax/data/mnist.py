"""MNIST and its relatives: the files listed by tensorflow-datasets, downloaded if missing, verified and decoded."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Mapping, Sequence
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
"""Names of the datasets."""

PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""Names of the files: images and labels for training, images and labels for testing."""

MAX_FILE_BYTES = 1 << 27
"""Maximum size of a file in bytes; the largest genuine one has 47 million."""

GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of a gzip file (RFC 1952)."""

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
"""SHA-256 digests of the decompressed ``PARTS``; tensorflow-datasets lists those of the gzip files only."""


@dataclass(frozen=True)
class Family:
    """What is known about a dataset before any of its files is read.

    Attributes:
        name: one of ``FAMILIES``.
        class_names: one for each label.
        image_shape: ``(H, W, C)``.
        counts: the numbers of training and test images.
        urls: the URL of the gzip file of each of the ``PARTS``.
        url_infos: the size and SHA-256 digest of each gzip file, by URL.
        unpacked: the part of each decompressed file, by SHA-256 digest; empty if the digests are unknown.
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
        """The part of each file, compressed or not, by SHA-256 digest."""
        return {self.url_infos[url].checksum: part for part, url in self.urls.items()} | dict(self.unpacked)


def family(name: str, directory: Path) -> Family:
    """Look a dataset up in tensorflow-datasets, which uses neither the network nor TensorFlow for this.

    Args:
        name: one of ``FAMILIES``.
        directory: the data directory.
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
    """Read the four files of a dataset from ``directory`` or ``directory/name``, downloading those that are missing.

    The files have the names under which they were published, and are compressed with gzip or not. Of several forms of a
    file, the first one that is intact is used. The network is not used if all of them exist.

    The content of every file is verified by its SHA-256 digest, however it is compressed. The digests of kmnist's
    content are unknown: compressed files must be the published ones, and of others the size and shape are checked.

    Args:
        name: one of ``FAMILIES``.
        directory: the data directory.

    Returns:
        images uint8 ``[N, 28, 28, 1]`` and labels int32 ``[N]``, in the order of the files.

    Raises:
        UsageError: the directory cannot be used, or a file in it is damaged or belongs to another dataset.
        DownloadError: a file is missing and cannot be downloaded.
        CnnJaxError: the server sent another file.
    """
    found = _find(name, directory)
    wanted = family(name, directory)
    owners = {
        sha256: (other, part) for other in FAMILIES for sha256, part in family(other, directory).part_of_sha256.items()
    }
    paths, contents = {}, {}
    for part, candidates in found.items():
        paths[part], contents[part] = _first_intact(candidates, part, wanted, owners, directory)
    missing = {part: url for part, url in wanted.urls.items() if part not in paths}
    if missing:
        fetch({url: wanted.url_infos[url] for url in missing.values()}, directory, name)
        downloaded = {part: directory / name / PurePosixPath(url).name for part, url in missing.items()}
        contents |= {part: _read(path, part, wanted, owners, directory) for part, path in downloaded.items()}
        paths |= downloaded
    train, test = (
        _split(parts, paths, contents, count, wanted)
        for parts, count in zip((PARTS[:2], PARTS[2:]), wanted.counts, strict=True)
    )
    return Dataset(name, train, test, wanted.class_names)


def is_on_disk(name: str, directory: Path) -> bool:
    """Whether all four files of a dataset are in ``directory`` or ``directory/name``."""
    return _find(name, directory).keys() == set(PARTS)


def _find(name: str, directory: Path) -> dict[str, list[Path]]:
    """The files that exist of each part that has any; those in the dataset's own folder come first."""
    found = {}
    for folder in (directory / name, directory):
        names = _files(folder)
        for part in PARTS:
            # Some archives of MNIST use the name train-images.idx3-ubyte.
            for spelling in (f"{part}.gz", part, part.replace("-idx", ".idx")):
                if spelling in names:
                    found.setdefault(part, []).append(folder / spelling)
    return found


def _files(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir() if path.is_file()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UsageError(
            f"cannot read the data directory {directory}: {error.strerror}; use another one with --data-dir"
        ) from None


def _first_intact(
    paths: Sequence[Path], part: str, wanted: Family, owners: Mapping[str, tuple[str, str]], directory: Path
) -> tuple[Path, bytes]:
    """The first of the files that can be read, and its content; if there is none, the error of the first is raised."""
    errors = []
    for path in paths:
        try:
            return path, _read(path, part, wanted, owners, directory)
        except UsageError as error:
            errors.append(error)
    raise errors[0]


def _read(path: Path, part: str, wanted: Family, owners: Mapping[str, tuple[str, str]], directory: Path) -> bytes:
    """The content of a file, decompressed.

    Raises:
        UsageError: the file cannot be read, or its content is not that of the published file.
    """
    try:
        with files.open_data(path, MAX_FILE_BYTES) as file:
            content = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; delete it to download it again") from None
    compressed = content.startswith(GZIP_MAGIC)
    owner = owners.get(hashlib.sha256(content).hexdigest())
    if compressed:
        content = _decompressed(content)
        owner = owner or owners.get(hashlib.sha256(content).hexdigest())  # it may have been compressed again
    if owner and owner != (wanted.name, part):
        target = directory.joinpath(*owner).with_suffix(".gz" if compressed else "")
        raise UsageError(f"{path} is {owner[0]}'s {owner[1]}, not {wanted.name}'s {part}; move it to {target}")
    if not owner and (compressed or wanted.unpacked):
        problem = "its content differs from" if wanted.unpacked else "compressed, it must be the same file as"
        raise UsageError(
            f"{path} is damaged or not {wanted.name}'s: {problem} the published file, by the SHA-256 digests; "
            "delete it to download it again"
        )
    return content


def _decompressed(content: bytes) -> bytes:
    """The content of a gzip file; empty if it is damaged or larger than ``MAX_FILE_BYTES``."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            decompressed = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        return b""
    return decompressed if len(decompressed) <= MAX_FILE_BYTES else b""


def _split(
    parts: Sequence[str], paths: Mapping[str, Path], contents: Mapping[str, bytes], count: int, wanted: Family
) -> Split:
    images_path, labels_path = (paths[part] for part in parts)
    images, labels = idx.images(contents[parts[0]], images_path), idx.labels(contents[parts[1]], labels_path)
    if len(images) != len(labels):
        raise UsageError(
            f"{images_path} and {labels_path} do not belong together: "
            f"{len(images)} images, {len(labels)} labels; replace them with the published files"
        )
    if images.shape != (count, *wanted.image_shape):
        raise UsageError(
            f"{images_path} is not {wanted.name}'s: its images have shape {images.shape}, "
            f"not {(count, *wanted.image_shape)}; replace it with the published file"
        )
    if labels.max() >= len(wanted.class_names):
        raise UsageError(
            f"{labels_path} is not {wanted.name}'s: it has label {labels.max()}, but there are only "
            f"{len(wanted.class_names)} classes; replace it with the published file"
        )
    return Split(images, labels)
