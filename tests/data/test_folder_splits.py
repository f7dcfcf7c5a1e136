"""The parts held out of a folder of images for testing and validation."""

import numpy as np
import pytest
from folders import gray, load, numbers, put, put_split, refusal

from cnn_jax.config import Config
from cnn_jax.data import folder


def held_out_values(root, **settings):
    """The values of the images in each split but the first."""
    return {name: set(numbers(split)) for name, split in load(root, **settings).splits.items() if name != "train"}


def test_a_fifth_is_held_out(root):
    sizes = {"a": 100, "b": 50, "c": 2, "d": 3}
    put_split(root, {".": sizes})
    dataset = load(root)
    counts = np.bincount(dataset.test.labels)
    assert 10 <= counts[0] <= 30
    assert 4 <= counts[1] <= 18
    assert (counts >= 1).all()
    assert (np.bincount(dataset.train.labels) >= 1).all()
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == list(range(155))
    classes = np.repeat(range(4), list(sizes.values()))
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.labels, classes[numbers(split)])
        assert sorted(split.labels) != split.labels.tolist()  # in random order


def test_the_split_does_not_depend_on_the_seed(root):
    put_split(root, {".": {"a": 30, "b": 30}})
    first, second = load(root, validation_fraction=0.3, seed=0), load(root, validation_fraction=0.3, seed=4)
    assert first.sha256 == second.sha256
    assert held_out_values(root)["test"] == set(numbers(first.test))
    other = held_out_values(root, validation_fraction=0.3, split_seed=1)
    assert other["test"] != set(numbers(first.test))
    assert other["validation"] != set(numbers(first.validation))


def test_a_new_file_moves_no_other(root):
    put_split(root, {".": {"a": 20, "b": 20}})
    before = held_out_values(root, validation_fraction=0.3)
    assert all(before.values())
    for number in range(40, 60):
        put(root, f"{'ab'[number % 2]}/{'!z'[number // 2 % 2]}{number}.png", gray(number))
        after = held_out_values(root, validation_fraction=0.3)
        assert {name: values & set(range(40)) for name, values in after.items()} == before
    assert after["test"] - before["test"]
    assert after["validation"] - before["validation"]
    for number in range(60, 70):
        put(root, f"c/{number}.png", gray(number))  # a new class
    after = held_out_values(root, validation_fraction=0.3)
    assert {name: values & set(range(40)) for name, values in after.items()} == before


def test_names_do_not_matter(root):
    put_split(root, {".": {"a": 20, "b": 20}})
    first = load(root, validation_fraction=0.3)
    for number, path in enumerate(sorted(root.glob("*/*.png"))):
        path.rename(path.with_name(f"{number * 7 % 40}-renamed.png"))
    root = root.rename(root.with_name("renamed"))
    assert load(root, validation_fraction=0.3).sha256 == first.sha256


def test_identical_images_are_on_one_side(root):
    for number in range(40):
        for copy in range(3):
            put(root, f"{'ab'[number % 2]}/{copy}-{number}.png", gray(number))
        put(root, f"{'ba'[number % 2]}/other-{number}.png", gray(number))  # also in the other class
    dataset = load(root, validation_fraction=0.3)
    values = [set(numbers(split)) for split in dataset.splits.values()]
    assert sum(map(len, values)) == len(set.union(*values)) == 40


@pytest.mark.parametrize("sizes", [{"a": 2, "b": 2}, {"a": 2, "b": 3, "c": 30}])
@pytest.mark.parametrize("split_seed", range(5))
def test_small_classes_are_in_every_split(root, sizes, split_seed):
    put_split(root, {".": sizes})
    dataset = load(root, split_seed=split_seed)
    for split in (dataset.train, dataset.test):
        assert set(split.labels) == set(range(len(sizes)))


def test_copies_of_one_image_cannot_be_split(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    for index in range(2):
        put(root, f"c/{index}.png", gray(9))
    assert refusal(root) == (
        "class 'c' has too few different images to hold a test split out of: every class needs at least 2"
    )


def test_too_few_for_validation(root):
    put_split(root, {".": {"a": 2, "b": 9}})
    assert refusal(root, validation_fraction=0.5) == (
        "class 'a' has too few different images to hold a validation split out of: every class needs at least 2"
    )


def test_all_images_without_a_split(root):
    put_split(root, {".": {"a": 1, "b": 3}})
    for index in range(2):
        put(root, f"c/{index}.png", gray(9))
    config = Config(dataset=f"folder:{root}")
    assert not folder.has_splits(str(root))
    dataset = folder.load_unsplit(str(root), config)
    assert dataset.name == folder.dataset_name(str(root)) == config.dataset
    assert numbers(dataset.test) == [0, 1, 2, 3, 9, 9]
    assert dataset.test.labels.tolist() == [0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_its_own_validation_split(root, name):
    put_split(root, {"train": {"a": 1, "b": 1}, name: {"a": 2, "b": 1}, "test": {"a": 1, "b": 1}})
    dataset = load(root)
    assert folder.has_splits(str(root))
    assert list(dataset.splits) == ["train", "validation", "test"]
    assert [sorted(numbers(split)) for split in dataset.splits.values()] == [[0, 1], [2, 3, 4], [5, 6]]
    assert dataset.validation.labels.tolist() == [0, 0, 1]
    assert refusal(root, validation_fraction=0.5) == (
        f"folder:{root} has its own validation split: leave out validation_fraction"
    )
    put(root, f"{name}/c/0.png", gray(0))
    assert refusal(root) == f"{root}/{name} and {root}/train must have the same classes, but only {name}/ has c"


def test_validation_held_out_of_train(root):
    put_split(root, {"train": {"a": 30, "b": 30}, "test": {"a": 1, "b": 1}})
    dataset = load(root, validation_fraction=0.5)
    assert numbers(dataset.test) == [60, 61]
    assert sorted(numbers(dataset.train) + numbers(dataset.validation)) == list(range(60))
    assert 15 <= len(dataset.validation) <= 45
