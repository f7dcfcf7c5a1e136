import dataclasses

import numpy as np
import pytest

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import Dataset, Split, with_validation
from cnn_jax.data.splits import content_hashes, held_out
from cnn_jax.errors import UsageError

NAMES = ("a", "b", "c")


def distinct(counts):
    """A split of images that are all different, with their index in the first two pixels, in random order."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    images = np.zeros((len(labels), 4, 3, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(len(labels)), 256)
    return Split(images, labels)


def indices(split):
    return (split.images[:, 0, 0, 0].astype(int) * 256 + split.images[:, 0, 1, 0]).tolist()


def test_validation_is_stratified_and_disjoint():
    counts = [200, 95, 10]
    dataset = Dataset("x", distinct(counts), distinct([1, 1, 1]), NAMES)
    held = with_validation(dataset, 0.1, split_seed=0)
    assert np.bincount(held.validation.labels).tolist() == [20, 10, 1]
    assert sorted(indices(held.train) + indices(held.validation)) == list(range(305))
    assert indices(held.train) == sorted(indices(held.train))  # in the given order
    for split in (held.train, held.validation):
        np.testing.assert_array_equal(split.labels, dataset.train.labels[indices(split)])
        assert split.labels.dtype == np.int32
    assert held.test is dataset.test
    again, other = (with_validation(dataset, 0.1, split_seed) for split_seed in (0, 1))
    assert again.sha256 == held.sha256
    assert indices(other.validation) != indices(held.validation)


def test_no_validation_by_default():
    dataset = Dataset("x", distinct([2, 2]), distinct([1, 1]), NAMES[:2])
    assert with_validation(dataset, 0.0, split_seed=0) is dataset
    assert list(dataset.splits) == ["train", "test"]


def test_validation_from_the_config():
    first, other_seed = (data.load(Config(dataset="digits", validation_fraction=0.1, seed=seed)) for seed in (0, 7))
    plain, other_split = data.load(Config(dataset="digits")), data.load(Config(dataset="digits", split_seed=1))
    assert first.sha256 == other_seed.sha256
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 1295, "validation": 142, "test": 360}
    np.testing.assert_allclose(np.bincount(first.validation.labels), 0.1 * np.bincount(plain.train.labels), atol=0.5)
    assert plain.validation is None
    assert plain.sha256 == other_split.sha256  # the test split of digits is fixed
    np.testing.assert_array_equal(first.test.images, plain.test.images)


def test_the_order_of_the_examples_does_not_matter():
    split = distinct([50, 50])
    shuffled = split.subset(np.random.default_rng(1).permutation(100))
    datasets = (Dataset("x", train, distinct([1, 1]), NAMES[:2]) for train in (split, shuffled))
    first, second = (set(indices(with_validation(dataset, 0.2, 0).validation)) for dataset in datasets)
    assert first == second
    assert len(first) == 20


def test_what_is_held_out_for_two_parts_is_independent():
    contents = [bytes([index // 256, index % 256]) for index in range(1000)]
    hashes = [content_hashes(contents, 0, part) for part in ("test", "validation")]
    assert abs(np.corrcoef(hashes)[0, 1]) < 0.1
    for values in hashes:
        assert 0 <= values.min() < 0.01
        assert 0.99 < values.max() <= 1
        assert values.mean() == pytest.approx(0.5, abs=0.04)


def test_same_on_every_supported_version():
    assert content_hashes([b"", b"abc"], 0, "test").round(6).tolist() == [0.155087, 0.915818]
    assert content_hashes([b"", b"abc"], 2**32 - 1, "validation").round(6).tolist() == [0.420118, 0.622342]


@pytest.mark.parametrize("exact", [True, False])
def test_copies_stay_together(exact):
    rng = np.random.default_rng(0)
    contents, labels = rng.integers(0, 60, 300), rng.integers(0, 3, 300)  # each content about five times, in any class
    hashes = content_hashes([bytes([content]) for content in contents], 0, "test")
    for fraction in (0.01, 0.2, 0.5, 0.97):
        mask = held_out(labels, hashes, fraction, "test", NAMES, exact)
        assert not set(contents[mask]) & set(contents[~mask])
        assert set(labels[mask]) == set(labels[~mask]) == {0, 1, 2}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_each_class_is_on_both_sides(exact, fraction):
    labels = np.repeat([0, 2], [2, 40])  # none of class 1
    for split_seed in range(10):
        hashes = content_hashes(map(bytes, np.arange(42)[:, np.newaxis].astype(np.uint8)), split_seed, "test")
        mask = held_out(labels, hashes, fraction, "test", NAMES, exact)
        assert set(labels[mask]) == set(labels[~mask]) == {0, 2}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("contents", ["abcda", "abbc"])
def test_small_classes_that_share_images(exact, contents):
    labels = np.minimum(np.arange(len(contents)) // 2, 1 if len(contents) == 5 else 9)
    for split_seed in range(50):
        for fraction in (0.2, 0.8):
            hashes = content_hashes([content.encode() for content in contents], split_seed, "test")
            mask = held_out(labels, hashes, fraction, "test", NAMES, exact)
            assert set(labels[mask]) == set(labels[~mask]) == set(labels)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("contents", "labels", "lacking"),
    [
        ("abc", [0, 0, 1], "b"),
        ("abcc", [0, 0, 1, 1], "b"),
        ("abbcca", [0, 0, 1, 1, 2, 2], "[abc]"),  # each image in two classes: three classes of two cannot be split
    ],
)
def test_too_few_examples(exact, contents, labels, lacking):
    hashes = content_hashes([content.encode() for content in contents], 0, "validation")
    with pytest.raises(
        UsageError,
        match=f"^class '{lacking}' has too few different images to hold a validation split out of: "
        "every class needs at least 2$",
    ):
        held_out(np.array(labels), hashes, 0.2, "validation", NAMES, exact)


def test_an_own_validation_split_and_a_fraction():
    dataset = Dataset("x", distinct([2, 2]), distinct([1, 1]), NAMES[:2], validation=distinct([1, 1]))
    with pytest.raises(UsageError, match=r"^x has its own validation split: leave out validation_fraction$"):
        with_validation(dataset, 0.5, 0)
    assert with_validation(dataset, 0, 0) is dataset


def test_the_digest_covers_every_split():
    split = distinct([3, 3])
    dataset = Dataset("x", split, split, NAMES[:2])
    variants = [
        dataset,
        dataclasses.replace(dataset, validation=split),
        dataclasses.replace(dataset, validation=split.subset(np.arange(5))),
        dataclasses.replace(dataset, test=split.subset(np.arange(5))),
        dataclasses.replace(dataset, train=split.subset(np.arange(5))),
        dataclasses.replace(dataset, class_names=("a", "c")),
        dataclasses.replace(dataset, train=Split(split.images, 1 - split.labels)),
    ]
    assert len({variant.sha256 for variant in variants}) == len(variants)
    assert dataclasses.replace(dataset, name="y").sha256 == dataset.sha256
