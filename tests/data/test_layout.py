"""Which images are found in a folder, and of which class and split they are."""

import os

import numpy as np
import pytest
from folders import encoded, gray, load, numbers, put, put_split, refusal

from cnn_jax.data import layout


def test_hidden_files_and_files_next_to_the_classes_are_ignored(root):
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    for name in ("README", "train/labels.csv", "train/a/.DS_Store", "test/b/Thumbs.db", "test/b/desktop.ini"):
        put(root, name, b"text")
    for name in ("dev/z/0.png", ".git/x/0.png", "train/.cache/0.png"):
        put(root, name, gray(9))
    dataset = load(root)
    assert dataset.class_names == ("a", "b")
    assert (sorted(numbers(dataset.train)), numbers(dataset.test)) == ([0, 1], [2, 3])


def test_a_class_named_train(root):
    put_split(root, {".": {"bus": 2, "train": 2}})
    assert load(root).class_names == ("bus", "train")


def test_links_are_followed(root, tmp_path):
    put_split(tmp_path / "elsewhere", {".": {"a": 2, "b": 2}})
    root.mkdir()
    for name in ("a", "b"):
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    (root / "b" / "link.png").symlink_to(tmp_path / "elsewhere" / "a" / "000.png")
    assert np.bincount(np.concatenate([load(root).train.labels, load(root).test.labels])).tolist() == [2, 3]


def test_images_below_the_class_folders(root, caplog):
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    for value, name in enumerate(
        ("b/2023/x.png", "b/2024/deep/er/1.png", "b/2024/deep/er.png", "b/01.png", "a/z/z.png")
    ):
        put(root, f"test/{name}", gray(10 + value))
    for name in ("a/.hidden/0.png", "b/2023/.0.png", "b/2023/Thumbs.db", "b/2024/__MACOSX/0.png"):
        put(root, f"test/{name}", encoded(gray(9)))
    (root / "train" / "a" / "empty").mkdir()
    test = load(root).test
    assert test.files.tolist() == [
        "test/a/000.png",
        "test/a/z/z.png",
        "test/b/000.png",
        "test/b/01.png",
        "test/b/2023/x.png",
        "test/b/2024/deep/er.png",
        "test/b/2024/deep/er/1.png",
    ]
    assert numbers(test) == [2, 14, 3, 13, 10, 12, 11]
    assert test.labels.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert caplog.records == []


def test_moving_images_to_nested_folders_changes_nothing(root):
    put_split(root, {".": {"a": 10, "b": 10}})
    before = load(root, validation_fraction=0.3)
    for number in range(5):
        put(root, f"a/sub/{number}/x", b"")
        (root / "a" / f"00{number}.png").rename(root / f"a/sub/{number}/x")
    after = load(root, validation_fraction=0.3)
    assert after.sha256 == before.sha256
    moved = [file for split in after.splits.values() for file in split.files if file.startswith("a/sub/")]
    assert sorted(moved) == [f"a/sub/{number}/x" for number in range(5)]


def test_the_order_of_the_directory_does_not_matter(root, monkeypatch):
    put_split(root, {f"{part}/{name}": {"x": 3, "y": 3} for part in ("train", "test") for name in "ab"})
    expected = load(root)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert load(root).test.files.tolist() == expected.test.files.tolist()
    assert load(root).sha256 == expected.sha256


def listed(root):
    listing = layout.list_images(root)
    return [str(path.relative_to(root)) for path in listing.paths]


def test_links_to_folders_do_not_loop(root, tmp_path):
    for name in ("a/0.png", "b/deep/1.png"):
        put(root, name, b"")
    for name in ("outside/inner/2.png", "outside/3.png"):
        put(tmp_path, name, b"")
    links = {
        "a/!self": root / "a",
        "a/root": root,  # would make the images of b those of a
        "a/above": tmp_path,
        "a/top": "/",
        "a/link": "link",
        "a/nowhere": tmp_path / "missing",
        "a/outside": tmp_path / "outside",
        "a/outside-again": tmp_path / "outside",
        "b/deep/up": "..",
        "b/!deep": "deep",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "outside" / "back").symlink_to(root / "a")
    # Links that lead nowhere are unreadable images.
    expected = ["a/0.png", "a/link", "a/nowhere", "a/outside/3.png", "a/outside/inner/2.png", "b/deep/1.png"]
    assert listed(root) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["images/cat/0.png", "images/dog/0.png"],
            "{0} has only one class, images: at least 2 classes are needed; if they are the folders in it, cat, dog, "
            "use folder:{0}/images",
        ),
        (
            ["a/b/train/cat/0.png", "a/b/test/cat/0.png", "__MACOSX/a/._b"],
            "{0} has only one class, a: at least 2 classes are needed; if they are the folders in it, test, train, use "
            "folder:{0}/a/b",
        ),
        (
            ["train/images/cat/0.png", "train/images/dog/0.png", "test/images/cat/0.png"],
            "{0} has only one class, images: at least 2 classes are needed; if they are the folders in "
            "{0}/train/images, cat, dog, move these to {0}/train",
        ),
        (
            ["cat/old/0.png"],
            "{0} has only one class, cat: at least 2 classes are needed, each in a folder with its name, or in such "
            "folders in train/ and test/",
        ),
    ],
)
def test_classes_that_are_further_below(root, files, message):
    for file in files:
        put(root, file, b"")
    assert refusal(root) == message.format(root)


def test_a_link_to_its_own_folder_as_the_only_class(root):
    root.mkdir()
    (root / "a").symlink_to(".")
    assert refusal(root).startswith(f"{root} has only one class, a: at least 2")


def test_the_same_folders_in_all_classes_are_reported(root, caplog):
    for number, year in enumerate((2023, 2024)):
        for name in ("cat", "dog"):
            put(root, f"{year}/{name}/{name}.png", gray(10 * number + len(name) + ord(name[0])))
    assert load(root).class_names == ("2023", "2024")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"the classes of {root} are 2023, 2024, not the folders that are in each of them, cat, dog"
    )
    caplog.clear()
    put(root, "2024/0.png", gray(0))
    load(root)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("Train", "Val", "TEST"),
        ("TRAIN", "VALIDATION", "test"),
        ("train", "Valid", "Test"),
        ("Training", "val", "testing"),
    ],
)
def test_the_names_of_splits(root, train, validation, test):
    put_split(root, {train: {"a": 1, "b": 1}, validation: {"a": 1, "b": 1}, test: {"a": 1, "b": 1}})
    dataset = load(root)
    assert dataset.class_names == ("a", "b")
    assert [sorted(numbers(split)) for split in dataset.splits.values()] == [[0, 1], [2, 3], [4, 5]]
    assert dataset.test.files.tolist() == [f"{test}/a/000.png", f"{test}/b/000.png"]


def test_a_csv_file_with_another_name_is_suggested(root):
    put(root, "train.csv", b"file,label")
    assert refusal(root) == (
        f"{root} contains no folders of images: at least 2 classes are needed, each in a folder with its name, in such "
        "folders in train/ and test/, or in a column of the file labels.csv; use "
        f"folder:{root}/train.csv if that is the file"
    )


def test_control_sequences_in_names(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/\x1b[31m\nred.png", b"text")
    assert r"b/\x1b[31m\nred.png is not a PNG" in refusal(root)
    (root / "c\n").mkdir()
    put(root, "c\n/0.png", gray(0))
    assert refusal(root) == rf"{root}: class names must be printable: rename c\n"


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("missing", "cannot read the folder {}: No such file or directory; check the path"),
        ("file", "cannot read the folder {}: Not a directory; check the path"),
    ],
)
def test_no_folder(tmp_path, path, wrong):
    put(tmp_path, "file", b"text")
    assert refusal(tmp_path / path) == (
        f"{wrong.format(tmp_path / path)}, and give that of a moved folder with --dataset folder:PATH"
    )


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ([], "{} contains no folders of images: at least 2 classes are needed, each in a folder with its name"),
        (["0.png", "1.png"], "{} contains no folders of images: at least 2"),
        (["a/0.png", "a/1.png"], "{} has only one class, a: at least 2 classes are needed"),
        (["train/a/0.png", "test/a/1.png"], "{} has only one class, a: at least 2 classes are needed"),
        (["train/0.png", "test/1.png"], "{} contains no folders of images: at least 2"),
        (
            ["a/0.png", "b/0.png", "b/1.png"],
            "{}/a has 1 readable image: every class needs at least 2",
        ),
        (["a/0.png", "a/1.png", "b/.hidden"], "{}/b has no readable images: every class"),
        (
            ["train/a/0.png", "train/b/0.png"],
            "{0} has train/ but no test/: add it, or use folder:{0}/train to hold out",
        ),
        (
            ["train/a/0.png", "train/b/0.png", "val/a/0.png"],
            "{0} has train/ and val/ but no test/: add it, or rename val/ to it",
        ),
        (
            [f"{part}/{name}/0.png" for part in ("train", "val", "validation", "test") for name in "ab"],
            "{0} has val/, validation/: keep one of them",
        ),
        (
            [f"{part}/{name}/0.png" for part in ("train", "Train", "test") for name in "ab"],
            "{0} has Train/, train/: keep one of them",
        ),
        (
            [f"{part}/{name}/0.png" for part in ("train", "test", "TEST", "testing") for name in "ab"],
            "{0} has TEST/, test/, testing/: keep one of them",
        ),
        (["Train/0.png", "train/0.png"], "{0} has Train/, train/: keep one of them"),
        (
            ["TRAIN/a/0.png", "TRAIN/b/0.png"],
            "{0} has TRAIN/ but no test/: add it, or use folder:{0}/TRAIN to hold out",
        ),
        (["test/a/0.png", "test/b/0.png", "train"], "{0} has test/ but no train/: add it, or use folder:{0}/test to"),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png"],
            "{0}/train and {0}/test must have the same classes, but only train/ has b",
        ),
        (
            ["train/a/0.png", "train/b/0.png", *(f"test/{name}/0.png" for name in "abcdef")],
            "{0}/test and {0}/train must have the same classes, but only test/ has c, d, e, ...",
        ),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/.hidden"],
            "{}/test/b has no readable images: every class needs at least 1",
        ),
    ],
)
def test_unsuitable_folders(root, files, wrong):
    root.mkdir()
    for file in files:
        put(root, file, gray(0) if file.endswith(".png") else b"")
    assert refusal(root).startswith(wrong.format(root))
