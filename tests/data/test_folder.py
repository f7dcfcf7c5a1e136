import contextlib
import hashlib
import io
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import folder
from cnn_jax.data.cache import ImageCache
from cnn_jax.errors import UsageError
from cnn_jax.files import user_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pictures"


def put(root, name, image, **options):
    """Write an image, or bytes instead of one."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def encoded(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def gray(value, size=(4, 3)):
    return np.full(size, value, np.uint8)


def put_split(root, counts, image=gray):
    """Write images of each class of each split; their first pixels are consecutive numbers."""
    number = 0
    for part, classes in counts.items():
        for name, count in classes.items():
            for index in range(count):
                put(root, f"{part}/{name}/{index:03}.png", image(number))
                number += 1


def load(root, **settings):
    return data.load(Config(dataset=f"folder:{root}", **settings))


def numbers(split):
    return split.images[:, 0, 0, 0].tolist()


def refusal(root, **settings):
    with pytest.raises(UsageError) as caught:
        load(root, **settings)
    message = str(caught.value)
    assert message.isprintable()
    return message


# Structure


def test_train_and_test(root, capfd, caplog):
    put_split(root, {"train": {"dog": 2, "cat": 3}, "test": {"dog": 1, "cat": 2}})
    dataset = load(root)
    assert dataset.name == f"folder:{root}"
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (4, 3, 1)
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    labels = dict(zip(numbers(dataset.train), dataset.train.labels.tolist(), strict=True))
    assert labels == {0: 1, 1: 1, 2: 0, 3: 0, 4: 0}
    assert numbers(dataset.test) == [6, 7, 5]
    assert dataset.test.labels.tolist() == [0, 0, 1]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_the_training_images_of_all_classes_are_mixed(root):
    put_split(root, {"train": {"a": 40, "b": 40}, "test": {"a": 2, "b": 2}})
    dataset = load(root)
    # Steps of 10 examples without --shuffle have both classes, with a probability of 0.98 for random orders.
    assert all(0 < labels.sum() < 10 for labels in dataset.train.labels.reshape(8, 10))
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in sorted(root.glob("train/*/*.png"))]
    assert numbers(dataset.train) == sorted(range(80), key=digests.__getitem__)
    assert dataset.train.labels.tolist() == [number // 40 for number in numbers(dataset.train)]


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


def test_a_relative_path_becomes_absolute(root, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    monkeypatch.chdir(root.parent)
    assert load("pictures").name == load("./pictures/").name == f"folder:{root}"
    monkeypatch.setenv("HOME", str(root.parent))
    assert load("~/pictures").name == f"folder:{root}"


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


# Size and channels


def test_files_of_every_kind(root):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8))
    kinds = {
        "0.png": {},
        "1.jpg": {},
        "2.webp": {"lossless": True},
        "3.bmp": {},
        "4.gif": {},
        "jpeg-in-fact.png": {"format": "JPEG"},
    }
    for part in ("train", "test"):
        for name in ("a", "b"):
            for file, options in kinds.items():
                put(root, f"{part}/{name}/{file}", picture, **options)
    dataset = load(root)
    assert dataset.train.images.shape == dataset.test.images.shape == (12, 6, 5, 3)
    for index in (0, 2, 3, 4):
        np.testing.assert_array_equal(dataset.train.images[index], np.asarray(picture))


def test_color_if_any_is_color(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    assert load(root).image_shape == (4, 3, 1)
    put(root, "b/color.png", np.full((4, 3, 3), [255, 0, 0], np.uint8))
    assert load(root).image_shape == (4, 3, 3)
    assert load(root, channels=1).image_shape == (4, 3, 1)
    assert 76 in numbers(load(root, channels=1).train) + numbers(load(root, channels=1).test)


def test_gray_in_three_channels(root):
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    dataset = load(root, channels=3)
    np.testing.assert_array_equal(dataset.train.images, np.stack([gray(0), gray(1)])[..., np.newaxis].repeat(3, axis=3))


def test_resized(root):
    put(root, "a/0.png", gray(10, (8, 9)))
    put(root, "a/1.png", gray(10, (3, 2)))
    put(root, "b/0.jpg", gray(10, (50, 30)))
    put(root, "b/1.webp", Image.fromarray(gray(10, (4, 4))))
    dataset = load(root, image_size=(6, 5), channels=1)
    assert dataset.image_shape == (6, 5, 1)
    np.testing.assert_allclose(np.concatenate([dataset.train.images, dataset.test.images]), 10, atol=2)


def test_different_sizes(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/zebra.png", gray(0, (5, 3)))
    message = refusal(root)
    assert message.startswith(f"the images of {root} differ in height and width, such as 4x3 (a/000.png) and 5x3")
    assert "(b/zebra.png): " in message
    assert message.endswith("such as --image-size 64 64")


def test_sizes_are_compared_after_rotation(root):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/turned.jpg", gray(0, (3, 4)), exif=sideways)
    assert load(root).image_shape == (4, 3, 1)


def test_settings_of_folders_only(root, tmp_path):
    for settings in ({"image_size": (4, 4)}, {"channels": 1}, {"skip_unreadable": True}):
        (name,) = settings
        for dataset in ("digits", "auto", "tfds:cifar10", "fashion_mnist"):
            with pytest.raises(
                UsageError, match=f"^{name} applies to folder:PATH only, not to {dataset}: leave it out$"
            ):
                data.load(Config(dataset=dataset, data_dir=str(tmp_path), **settings))


# Errors


@pytest.fixture
def damaged_root(root):
    put_split(root, {".": {"a": 5, "b": 5}})
    put(root, "a/text.png", b"text")
    put(root, "a/truncated.png", put(root, "b/000.png", gray(5)).read_bytes()[:45])
    put(root, "b/annotation.txt", b"text")
    return root


def test_unreadable_files_are_named(damaged_root):
    for name, wrong in {
        "a/text.png": "is not a PNG, JPEG, WebP, BMP or GIF image",
        "a/truncated.png": "cannot be decoded: ",
        "b/annotation.txt": "is not a PNG, JPEG, WebP, BMP or GIF image",
    }.items():
        message = refusal(damaged_root)
        assert message.startswith(f"{damaged_root / name} {wrong}")
        assert message.endswith("; remove it or use --skip-unreadable")
        (damaged_root / name).rename(damaged_root / f".{name.replace('/', '-')}")
    dataset = load(damaged_root)
    assert len(dataset.train) + len(dataset.test) == 10


def test_unreadable_files_are_skipped_and_counted_each_time(damaged_root, caplog):
    for _ in range(2):
        dataset = load(damaged_root, skip_unreadable=True)
        assert sorted(numbers(dataset.train) + numbers(dataset.test)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("cnn_jax", logging.WARNING)
        assert record.getMessage() == (
            f"skipped 3 of the 13 files of {damaged_root}, which cannot be read as images; the first is "
            f"{damaged_root / 'a' / 'text.png'}"
        )
        caplog.clear()
    assert "a/text.png is not a PNG" in refusal(damaged_root)  # the cache of one setting is not used for the other


def test_nested_folders_are_ignored_with_a_warning(root, caplog):
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    for name in ("train/b/2023/0.png", "train/b/2024/0.png", "test/a/2024/deep/0.png", "test/a/.hidden/0.png"):
        put(root, name, gray(9))
    dataset = load(root)
    assert (sorted(numbers(dataset.train)), numbers(dataset.test)) == ([0, 1], [2, 3])
    (record,) = caplog.records
    assert record.getMessage() == (
        f"ignored 3 folder(s) inside the class folders of {root}; the first is {root / 'train' / 'b' / '2023'}"
    )


def test_no_readable_image_of_a_class(root, caplog):
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 2}})
    put(root, "test/b/0.png", b"text")
    message = refusal(root, skip_unreadable=True)
    assert message == f"{root / 'test' / 'b'} has too few readable images, 0: every class needs at least 1"


def test_no_readable_image(root):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        put(root, name, b"text")
    assert refusal(root, skip_unreadable=True) == f"none of the 4 files of {root} can be read as an image"


def test_a_decompression_bomb(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    header = bytearray(put(root, "b/bomb.png", gray(0)).read_bytes())
    header[16:24] = b"\0\0\xff\xff\0\0\xff\xff"
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    put(root, "b/bomb.png", bytes(header))
    for settings in ({}, {"image_size": (4, 4)}, {"image_size": (4, 4), "channels": 3}):
        assert refusal(root, **settings).startswith(f"{root / 'b' / 'bomb.png'} is too large")


def test_control_sequences_in_names(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/\x1b[31m\nred.png", b"text")
    assert r"b/\x1b[31m\nred.png is not a PNG" in refusal(root)
    (root / "c\n").mkdir()
    put(root, "c\n/0.png", gray(0))
    assert refusal(root) == rf"{root}: c\n is not a printable class name: rename the folder"


@contextlib.contextmanager
def unprivileged():
    """Run as a user other than root, to whom permissions apply."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_permission():
    with tempfile.TemporaryDirectory() as name:  # accessible to other users
        root = Path(name)
        root.chmod(0o755)
        put_split(root, {".": {"a": 2, "b": 2}})
        load(root)  # import everything first, as the packages may be readable for root only
        (root / "a" / "001.png").chmod(0)
        with unprivileged():
            assert refusal(root).startswith(f"cannot read {root}/a/001.png: Permission denied; remove it or use")
        for mode in (0o000, 0o444):
            (root / "b").chmod(mode)
            with unprivileged():
                assert "Permission denied" in refusal(root)
        (root / "b").chmod(0o755)


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


def test_unknown_home_directory():
    assert refusal("~nobody-of-this-name/x").startswith("the home directory in ~nobody-of-this-name/x is unknown: ")


@pytest.mark.parametrize("name", ["folder:", "folder"])
def test_no_path(name):
    with pytest.raises(UsageError, match=rf"unknown dataset '{name}'; did you mean 'folder:PATH'\?; datasets: .*"):
        data.load(Config(dataset=name))


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
            "{}/a has too few readable images, 1: every class needs at least 2",
        ),
        (["a/0.png", "a/1.png", "b/.hidden"], "{}/b has too few readable images, 0: every class"),
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
            "{}/test/b has too few readable images, 0: every class needs at least 1",
        ),
    ],
)
def test_unsuitable_folders(root, files, wrong):
    root.mkdir()
    for file in files:
        put(root, file, gray(0) if file.endswith(".png") else b"")
    assert refusal(root).startswith(wrong.format(root))


def test_not_enough_memory(root, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "file"))  # no cache can be written
    empty = np.empty

    def limited(shape, *args, **options):
        if shape == (4, 20, 30, 1):
            raise MemoryError
        return empty(shape, *args, **options)

    monkeypatch.setattr(np, "empty", limited)
    assert refusal(root, image_size=(20, 30)) == (
        f"not enough memory for the images of {root}, 4x20x30x1 bytes: use a smaller --image-size"
    )


def test_images_that_do_not_fit_are_refused_before_they_are_decoded(root, monkeypatch, decoded):
    put_split(
        root, {".": {"a": 300, "b": 300}}, lambda number: np.full((2, 2, 3), [number // 256, number % 256, 0], np.uint8)
    )
    monkeypatch.setattr(ImageCache, "space_available", lambda cache: 10**7)
    assert refusal(root, image_size=(100, 200), skip_unreadable=True) == (
        f"the 600 images of {root} need 0.07 GB for 100x200x3 each, but 0.01 GB of memory and of disk in "
        f"{user_cache()} are free: use a smaller --image-size"
    )
    assert len(decoded) < 300
    assert cache_files() == []
    # Decoded at another size.
    assert load(root, image_size=(5, 5)).image_shape == (5, 5, 3)


def test_cached_images_need_no_more_space(kept, monkeypatch):
    root, _ = kept
    monkeypatch.setattr(ImageCache, "space_available", lambda cache: 7 * 12)  # 7 images
    put_split(root, {"test": {"a": 1}}, lambda number: gray(100))  # another image in its place
    assert len(load(root).test) == 2
    put(root, "test/a/1.png", gray(101))
    assert len(load(root).test) == 3
    put(root, "test/a/2.png", gray(102))
    assert refusal(root).startswith(f"the 8 images of {root} need 0.00 GB for 4x3x1 each")
    (root / "test/a/2.png").unlink()
    monkeypatch.setattr(ImageCache, "space_available", lambda cache: 0)
    assert len(load(root).test) == 3


def test_the_space_for_images(root, tmp_path, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    monkeypatch.setattr("cnn_jax.data.cache.available_memory", lambda: 4 * 2 * 12)
    put(tmp_path, "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no cache can be written
    assert load(root).image_shape == (4, 3, 1)
    put(root, "a/new.png", gray(9))
    assert "the 5 images" in refusal(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load(root).image_shape == (4, 3, 1)


# Cache


def cache_files():
    return sorted((user_cache() / "folders").iterdir())


@pytest.fixture
def kept(root):
    """A folder whose images are cached, and the cache file."""
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    load(root)
    (cache,) = cache_files()
    return root, cache


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded after this fixture is set up."""
    paths = []
    read = folder.read_image
    monkeypatch.setattr(folder, "read_image", lambda file, *args: paths.append(file.name) or read(file, *args))
    return paths


def assert_as_without_a_cache(root, tmp_path, monkeypatch, **settings):
    """The dataset, after comparing it with the files decoded anew."""
    dataset = load(root, **settings)
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=tmp_path))
        assert load(root, **settings).sha256 == dataset.sha256
    return dataset


def test_cached_images_are_not_decoded_again(kept, decoded):
    root, cache = kept
    dataset = load(root)
    assert (sorted(numbers(dataset.train)), numbers(dataset.test)) == ([0, 1, 2, 3], [4, 5])
    assert dataset.train.images.shape == (4, 4, 3, 1)
    root.rename(root.with_name("moved"))
    assert load(root.with_name("moved"), seed=5).name == f"folder:{root.with_name('moved')}"
    assert decoded == []
    assert cache_files() == [cache]


def test_only_changed_and_new_files_are_decoded(kept, decoded, tmp_path, monkeypatch):
    root, _ = kept
    path = root / "train" / "b" / "001.png"
    content = path.read_bytes()
    changed = put(root, path, gray(200)).read_bytes()
    assert len(changed) == len(content)
    assert sorted(numbers(load(root).train)) == [0, 1, 2, 200]
    assert decoded == [path]
    path.write_bytes(content)
    assert sorted(numbers(load(root).train)) == [0, 1, 2, 3]
    new = put(root, "test/a/!.png", gray(100))
    assert numbers(load(root).test) == [100, 4, 5]
    assert decoded == [path, new]
    assert_as_without_a_cache(root, tmp_path, monkeypatch)


def test_renamed_files_and_other_splits_are_not_decoded(root, decoded, tmp_path, monkeypatch):
    put_split(root, {".": {"a": 10, "b": 10}})
    load(root)
    assert len(decoded) == 20
    (root / "a" / "001.png").rename(root / "b" / "!.png")
    (root / "b").rename(root / "c")
    loaded = [load(root, **settings) for settings in ({}, {"split_seed": 1}, {"validation_fraction": 0.3})]
    root = root.rename(root.with_name("renamed"))
    loaded.append(load(root))
    loaded.append(folder.load_unsplit(str(root), Config(dataset=f"folder:{root}")))
    assert len(decoded) == 20
    assert loaded[0].sha256 == loaded[3].sha256
    assert loaded[0].sha256 != loaded[1].sha256
    for settings in ({}, {"split_seed": 1}, {"validation_fraction": 0.3}):
        assert_as_without_a_cache(root, tmp_path, monkeypatch, **settings)


@pytest.mark.parametrize("gray_first", [True, False])
def test_images_are_reused_when_the_first_in_color_comes_or_the_last_one_goes(
    root, decoded, tmp_path, monkeypatch, gray_first
):
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    color = put(root, "test/a/color.png", np.full((4, 3, 3), [255, 0, 0], np.uint8))
    hidden = color.with_name(".hidden")
    for shown in (not gray_first, gray_first):
        if shown != color.exists():
            color.rename(hidden) if color.exists() else hidden.rename(color)
        decoded.clear()
        assert load(root).image_shape == (4, 3, 3 if shown else 1)
    assert decoded == ([color] if gray_first else [])
    assert_as_without_a_cache(root, tmp_path, monkeypatch)


def test_other_settings_are_decoded_anew(kept, decoded):
    root, _ = kept
    for settings in ({"channels": 3}, {"image_size": (2, 2)}, {"image_size": (2, 2), "channels": 3}):
        before = len(decoded)
        assert load(root, **settings).image_shape == (*settings.get("image_size", (4, 3)), settings.get("channels", 1))
        assert len(decoded) == before + 6


def test_another_version_of_pillow(kept, decoded, monkeypatch):
    root, _ = kept
    monkeypatch.setattr("PIL.__version__", "99.0.0")
    load(root)
    assert len(decoded) == 6


@pytest.mark.parametrize("times", [1, 2])
def test_the_splits_are_parts_of_one_mapped_file(root, times):
    put_split(root, {".": {"a": 20, "b": 20}})
    for _ in range(times):
        dataset = load(root, validation_fraction=0.3)
    bases = []
    for split in dataset.splits.values():
        assert type(split.images) is np.ndarray
        assert not split.images.flags.writeable
        base = split.images
        while not isinstance(base, np.memmap):
            base = base.base
        bases.append(base)
    assert all(np.shares_memory(base, bases[0]) for base in bases)
    assert sum(split.images.nbytes for split in dataset.splits.values()) == bases[0].nbytes
    for one, other in itertools.combinations(dataset.splits.values(), 2):
        assert not np.shares_memory(one.images, other.images)


def test_images_stay_valid_after_their_cache_is_removed_or_replaced(kept):
    root, cache = kept
    dataset = load(root)
    cache.unlink()
    load(root)
    assert (sorted(numbers(dataset.train)), numbers(dataset.test)) == ([0, 1, 2, 3], [4, 5])


def forged(content, shape=(6, 4, 3, 1)):
    """The same entry with another shape, and the digest that belongs to it."""
    index = content[72 : 72 + 65 * 6]
    encoded_shape = np.array(shape, "<u8").tobytes()
    return content[:72] + index + encoded_shape + hashlib.sha256(index + encoded_shape).digest()


@pytest.mark.parametrize(
    ("damage", "num_decoded"),
    [
        (lambda content: b"", 6),
        (lambda content: b"text", 6),
        (lambda content: content[:-1], 6),
        (lambda content: content[: len(content) // 2], 6),
        (lambda content: content + b"x", 6),
        (lambda content: content[1:], 6),
        (lambda content: content.replace(bytes([3] * 12), bytes([3] * 11 + [4])), 1),
        (lambda content: content[:72] + content[72:].replace(content[72:80], bytes(8)), 6),
        (lambda content: content[:-32] + bytes(32), 6),
        (lambda content: forged(content, (1 << 40, 4, 3, 1)), 6),
        (lambda content: forged(content, (0, 4, 3, 1)), 6),
        (lambda content: forged(content, ((1 << 64) - 1,) * 4), 6),
        (lambda content: forged(b"\x80\x04" + content[2:]), 1),
    ],
)
def test_a_damaged_cache_is_replaced(kept, decoded, damage, num_decoded, caplog, capfd):
    root, cache = kept
    content = cache.read_bytes()
    assert forged(content) == content
    cache.write_bytes(damage(content))
    assert cache.read_bytes() != content
    for _ in range(2):
        dataset = load(root)
        assert (sorted(numbers(dataset.train)), numbers(dataset.test)) == ([0, 1, 2, 3], [4, 5])
        assert len(decoded) == num_decoded
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert cache_files() == [cache]
    assert cache.read_bytes() == content


def replace_by_link(cache):
    cache.symlink_to(cache.rename(cache.with_name("elsewhere")))


@pytest.mark.parametrize(
    "replace",
    [
        replace_by_link,
        lambda cache: cache.unlink() or os.mkfifo(cache),
        lambda cache: cache.rename(cache.with_name("elsewhere")) and cache.mkdir(),
        lambda cache: cache.rename(cache.with_name("elsewhere")) and cache.symlink_to("missing"),
    ],
)
def test_a_cache_file_that_is_none_is_not_used(kept, decoded, replace):
    root, cache = kept
    replace(cache)
    for _ in range(2):
        dataset = load(root)
        assert (sorted(numbers(dataset.train)), numbers(dataset.test)) == ([0, 1, 2, 3], [4, 5])
    assert len(decoded) == (12 if cache.is_dir() else 6)


def test_a_cache_that_cannot_be_written(root, tmp_path, monkeypatch, caplog, capfd):
    put_split(root, {".": {"a": 2, "b": 2}})
    expected = load(root)
    put(tmp_path, "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    dataset = load(root)
    assert dataset.sha256 == expected.sha256
    assert not dataset.train.images.flags.writeable
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """The user's cache on a file system of its own, of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    yield disk
    subprocess.run(["umount", disk], check=True)


# 0.2 MB fit twice, in the temporary file and in the entry; 0.6 MB once; 3.2 MB not at all.
@pytest.mark.parametrize(("side", "fits"), [(50, True), (90, False), (200, False)])
def test_a_full_disk(root, small_disk, tmp_path, monkeypatch, caplog, side, fits):
    put_split(root, {".": {"a": 40, "b": 40}})
    dataset = assert_as_without_a_cache(root, tmp_path, monkeypatch, image_size=(side, side))
    assert not dataset.train.images.flags.writeable
    assert len(cache_files()) == fits
    assert shutil.disk_usage(small_disk).used <= fits * (1 << 19)
    assert caplog.records == []


def test_a_cache_that_others_can_write_to_is_not_used(kept, decoded):
    root, cache = kept
    load(root)
    assert decoded == []
    cache.parent.chmod(0o777)
    load(root)
    assert len(decoded) == 6


def test_nothing_remains_after_an_error(root, before_opening):
    put_split(root, {".": {"a": 30, "b": 30}})

    def interrupt():
        raise KeyboardInterrupt

    (root / "b" / "!.png").write_bytes(b"text")
    refusal(root)
    (root / "b" / "!.png").unlink()
    before_opening(root / "b" / "020.png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert cache_files() == []


def test_no_file_is_still_being_read_after_an_error(root, monkeypatch):
    put_split(root, {".": {"a": 30, "b": 30}})
    put(root, "a/!.png", gray(0, (5, 3)))
    read = folder.read_image
    running = []

    def slow(file, *args):
        running.append(file.name)
        time.sleep(0.005)
        image = read(file, *args)
        running.remove(file.name)
        return image

    monkeypatch.setattr(folder, "read_image", slow)
    assert "differ in height and width" in refusal(root)
    assert running == []


LIMITED = """
import re, resource, sys
from pathlib import Path
import numpy as np
from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.training.input import ArraySource
from cnn_jax.training.sharding import make_mesh

config = Config(dataset=sys.argv[1], image_size=(1000, 1000))

def total(split):
    source = ArraySource(split, batch_size=4, seed=0, shuffle=True, mesh=make_mesh(), max_chunk_steps=1)
    chunks = (source.chunk(0, step, step + 1).batches for step in range(source.steps_per_epoch))
    return sum(int((np.asarray(chunk.images[..., 0, 0, 0]) * np.asarray(chunk.mask, int)).sum()) for chunk in chunks)

total(data.Split(np.zeros((8, 1000, 1000, 1), np.uint8), np.zeros(8, np.int32)))  # the memory of jax itself
used = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (60 << 20),) * 2)
dataset = data.load(config)
print(total(dataset.train) + total(dataset.test))
try:
    np.ones(dataset.train.images.shape, np.uint8)
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of anonymous memory")
def test_a_folder_larger_than_memory(root):
    put_split(root, {".": {"a": 60, "b": 60}})
    name = f"folder:{root}"
    load(root, image_size=(1000, 1000))
    limited = subprocess.run([sys.executable, "-c", LIMITED, name], capture_output=True, text=True, check=True)
    assert limited.stdout.split() == [str(sum(range(120))), "limited"]


@pytest.fixture(scope="module")
def open_events():
    """A list of functions to call with the path of each file before it is opened."""
    functions = []

    def hook(event, args):
        if event == "open" and functions:
            for function in functions:
                function(str(args[0]))

    sys.addaudithook(hook)  # hooks cannot be removed
    return functions


@pytest.fixture
def before_opening(open_events):
    """Calls a function before a file is opened."""
    yield lambda path, action: open_events.append(lambda opened: opened == str(path) and action())
    open_events.clear()


def test_each_file_is_read_once(root, open_events):
    put_split(root, {".": {"a": 3, "b": 3}})
    opened = []
    open_events.append(opened.append)
    for _ in range(2):
        opened.clear()
        load(root)
        assert sorted(path for path in opened if path.endswith(".png")) == sorted(map(str, root.glob("*/*.png")))
    open_events.clear()


def test_a_file_that_changes_while_it_is_decoded(root, monkeypatch):
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    path = root / "train" / "b" / "001.png"
    read = folder.read_image

    def change(file, *args):
        if file.name == path:
            path.write_bytes(encoded(gray(200)))
        return read(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_image", change)
        assert sorted(numbers(load(root).train)) == [0, 1, 2, 3]
    assert sorted(numbers(load(root).train)) == [0, 1, 2, 200]


def test_a_pipe_and_a_huge_file_are_skipped(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    os.mkfifo(root / "a" / "pipe.png")
    with (root / "b" / "huge.png").open("wb") as file:
        file.truncate(200 * 10**9)
    assert "pipe.png: not a regular file; remove it or use --skip-unreadable" in refusal(root)
    dataset = load(root, skip_unreadable=True)
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == [0, 1, 2, 3]


# Output


def test_a_progress_bar_on_a_terminal_only(root, monkeypatch, capfd):
    put_split(root, {".": {"a": 2, "b": 2}})
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    load(root)
    for words in ("reading images", "4/4"):
        assert words in terminal.getvalue()
    assert capfd.readouterr().out == ""


def test_pillows_warnings_are_suppressed(root, capfd):
    # Announces a thousand fractions that are missing.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\xe8\x03\0\0\x08\0\0\0\0\0\0\0"
    for value, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png")):
        put(root, name, gray(value), exif=exif)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        assert len(load(root).train) == 2
    assert caught_warnings == []
    assert capfd.readouterr() == ("", "")
