"""Test and validation splits held out of data that is published without them.

Which examples are held out depends on their content and on ``--split-seed``: each example has a keyed hash of its
content, a number from 0 to 1, and those with the smallest hashes are held out. So the order of the examples and the
names of their files are irrelevant, and identical images are always on the same side.

How many are held out depends on whether the data can grow. In a folder, an example is held out if its hash is below the
fraction, so adding one never moves another one to the other side; the number held out is the fraction on average (of
1,000 examples, 20 % are 200 with a standard deviation of 13). Of any other dataset, the fraction of each class is held
out exactly, except that copies of an image stay together.

At least one example of each class is held out, and at least one is not. If necessary, the one with the smallest or
largest hash in the class is moved to the other side, with its copies. Only this, in classes of a few examples, lets a
new file in a folder move another one.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cnn_jax.data.dataset import Dataset
from cnn_jax.errors import UsageError

TEST_FRACTION = 0.2
"""Fraction of the examples held out for testing from a dataset without a test split."""

Part = Literal["test", "validation"]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""What the splits are called in folders and tables, in any letter case."""


def split_named(name: str) -> str | None:
    """The split that a folder or a table calls by this name, or None."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def with_validation(dataset: Dataset, fraction: float, split_seed: int) -> Dataset:
    """Hold a validation split out of the training split.

    Args:
        dataset: the dataset, which is returned unchanged if the fraction is 0.
        fraction: the fraction of each class in the training split to hold out.
        split_seed: the key of the hash.

    Raises:
        UsageError: the dataset has its own validation split, or a class has too few examples.
    """
    if not fraction:
        return dataset
    if dataset.validation is not None:
        raise own_validation(dataset.name)
    hashes = content_hashes(map(np.ascontiguousarray, dataset.train.images), split_seed, "validation")
    mask = held_out(dataset.train.labels, hashes, fraction, "validation", dataset.class_names, exact=True)
    return replace(dataset, train=dataset.train.subset(~mask), validation=dataset.train.subset(mask))


def own_validation(name: str) -> UsageError:
    """The error for ``validation_fraction`` with a dataset that has its own validation split."""
    return UsageError(f"{name} has its own validation split: leave out validation_fraction")


def content_hashes(contents: Iterable[bytes], split_seed: int, part: Part) -> np.ndarray:
    """A keyed hash of the content of each example, float64 ``[N]`` from 0 to 1; those for two parts are independent."""
    key, person = split_seed.to_bytes(8, "little"), part.encode()
    digests = (hashlib.blake2b(content, digest_size=8, key=key, person=person).digest() for content in contents)
    return np.frombuffer(b"".join(digests), "<u8") / 2**64


def held_out(
    labels: np.ndarray, hashes: np.ndarray, fraction: float, part: Part, class_names: Sequence[str], exact: bool
) -> np.ndarray:
    """Which examples to hold out: at least one of each class, and not all of any.

    Args:
        labels: int32 ``[N]``.
        hashes: the result of ``content_hashes``.
        fraction: the fraction to hold out.
        part: what the examples are held out for, for the error message.
        class_names: one for each label.
        exact: whether to hold out the fraction of each class, or all examples with a hash below the fraction.

    Returns:
        bool ``[N]``.

    Raises:
        UsageError: a class has fewer than two different examples, or shares them with other small classes.
    """
    counts = np.bincount(labels)

    def absent(mask: np.ndarray) -> np.ndarray:
        """The labels of which there are examples, but none in the mask."""
        return np.flatnonzero((counts > 0) & (np.bincount(labels[mask], minlength=len(counts)) == 0))

    if exact:
        by_class = hashes[np.lexsort((hashes, labels))]
        last = np.cumsum(counts) - counts + np.maximum(1, np.rint(fraction * counts).astype(int)) - 1
        thresholds = by_class[np.minimum(last, len(labels) - 1)]
        mask = np.isin(hashes, hashes[hashes <= thresholds[labels]])
    else:
        mask = hashes < fraction
    for held, step in ((True, 1), (False, -1)):
        for label in absent(mask == held):
            for value in np.unique(hashes[labels == label])[::step]:
                moved = np.where(hashes == value, held, mask)
                if len(absent(moved != held)) <= len(absent(mask != held)):  # no class is left without the other side
                    mask = moved
                    break
    if lacking := [*absent(mask), *absent(~mask)]:
        raise UsageError(
            f"class {class_names[lacking[0]]!r} has too few different images to hold a {part} split out of: "
            "every class needs at least 2"
        )
    return mask
