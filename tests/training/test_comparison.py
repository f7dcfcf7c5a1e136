"""What a comparison says about runs that it is given: differences, and which test images two runs share."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.config import Config
from cnn_jax.training.comparison import ImageResults, RunResult, compare
from cnn_jax.training.mcnemar import PairedCounts, holm


def make_run(name, correct=(1, 1, 0, 0), digests=b"abcd", files=None, dataset="squares", **fields):
    """A run with test images that are named by single letters."""
    images = ImageResults(
        correct=np.array(correct, bool),
        loss=0.5,
        dataset=dataset,
        digests=[bytes([digest]) for digest in digests],
        files=None if files is None else np.array(list(files), object),
    )
    values = {
        "config": Config(dataset=dataset),
        "image_shape": (8, 8, 1),
        "class_names": ("cat", "dog"),
        "data_sha256": "5e",
        "history": (),
        "step": 15,
        "num_parameters": 7,
        "images": images,
    }
    return RunResult(name=name, workdir=Path(name), **values | fields)


def counts(*runs):
    (pair,) = compare(runs).pairs
    assert (pair.first, pair.second) == tuple(run.name for run in runs)
    return pair.counts


def test_the_same_images_in_the_same_order():
    assert counts(make_run("a"), make_run("b", [1, 0, 1, 0])) == PairedCounts(1, 1, 1, 1)


def test_images_in_another_order_and_some_that_only_one_run_has():
    """They have b, c and d in common, which the first classifies as 1, 0, 0 and the second as 1, 1, 0."""
    assert counts(make_run("a"), make_run("b", [0, 1, 1, 0], b"dbcx")) == PairedCounts(1, 0, 1, 1)
    assert counts(make_run("a"), make_run("b", [0, 1], b"db")) == PairedCounts(1, 0, 0, 1)


def test_copies_of_an_image_are_matched_once_each():
    first, second = make_run("a", [1, 1, 1, 0], b"aaab"), make_run("b", [0, 0, 1, 1], b"aabb")
    assert counts(first, second) == PairedCounts(0, 2, 1, 0)


def test_files_of_a_folder_are_matched_by_their_names_whatever_their_pixels():
    first = make_run("a", files="pqrs", dataset="folder:/photos")
    second = make_run("b", [1, 0], b"xy", files="sp", dataset="folder:/photos", image_shape=(4, 4, 1))
    assert counts(first, second) == PairedCounts(0, 1, 1, 0)


def test_files_of_different_folders_are_matched_by_their_pixels():
    """Files of different folders may have the same name."""
    first = make_run("a", files="pqrs", dataset="folder:/photos")
    second = make_run("b", [1, 1, 1, 1], b"zzaz", files="pqrs", dataset="folder:/other")
    assert counts(first, second) == PairedCounts(1, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digests": b"wxyz"}, "no image is in the test splits of both"),
        ({"class_names": ("cat", "yak")}, "their classes differ"),
        ({"class_names": ("cat", "dog", "yak")}, "their classes differ"),
        ({"image_shape": (9, 8, 1)}, "their images differ in size or channels"),
        ({"images": "it has moved"}, "b was not evaluated"),
        ({"files": "wxyz", "dataset": "folder:/p"}, None),
    ],
)
def test_why_images_are_not_compared(changes, reason):
    result = counts(make_run("a"), make_run("b", **changes))
    assert result == (reason or PairedCounts(2, 0, 0, 2))


def test_classes_in_another_order_are_the_same_classes():
    assert len(counts(make_run("a"), make_run("b", class_names=("dog", "cat")))) == 4


def test_every_pair_is_tested_with_holms_correction():
    rng = np.random.default_rng(0)
    correct = {name: rng.random(200) < accuracy for name, accuracy in (("a", 0.9), ("b", 0.8), ("c", 0.85))}
    runs = [make_run(name, array, range(200)) for name, array in correct.items()]
    lost = make_run("lost", images="it has moved")
    comparison = compare([*runs, lost])
    tested = [pair for pair in comparison.pairs if "lost" not in (pair.first, pair.second)]
    assert [(pair.first, pair.second) for pair in tested] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert comparison.num_tests == 3
    for pair in tested:
        assert pair.counts == PairedCounts.of(correct[pair.first], correct[pair.second])
    assert [pair.adjusted_p_value for pair in tested] == holm([pair.counts.p_value for pair in tested])
    others = [pair for pair in comparison.pairs if pair not in tested]
    assert [(pair.counts, pair.adjusted_p_value) for pair in others] == 3 * [("lost was not evaluated", None)]


def test_only_what_differs():
    same = make_run("a")
    assert compare([same, make_run("b")]).differences == {}
    other = make_run(
        "b",
        config=Config(dataset="squares", learning_rate=0.5, patience=3),
        image_shape=(9, 9, 3),
        class_names=("cat", "yak"),
        data_sha256="6f",
    )
    assert compare([same, other, same]).differences == {
        "learning_rate": (0.01, 0.5, 0.01),
        "patience": (None, 3, None),
        "image_shape": ((8, 8, 1), (9, 9, 3), (8, 8, 1)),
        "class_names": (("cat", "dog"), ("cat", "yak"), ("cat", "dog")),
        "data_sha256": ("5e", "6f", "5e"),
    }


def test_versions_differ_only_if_they_are_known():
    run = make_run("a")
    first, second, unknown = (
        dataclasses.replace(run, versions=versions)
        for versions in ({"jax": "0.10.2", "flax": "1"}, {"jax": "0.7.2", "flax": "1"}, {})
    )
    assert compare([first, unknown]).differences == {}
    assert compare([first, second, unknown]).differences == {"jax": ("0.10.2", "0.7.2", None)}
