"""The sizes, channels and formats of the images in a folder, and unreadable files."""

import logging
import os
import time
import warnings
import zlib

import numpy as np
import pytest
from folders import encoded, gray, load, numbers, put, put_split, refusal
from PIL import Image

from cnn_jax.data import folder


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


def test_no_readable_image_of_a_class(root, caplog):
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 2}})
    put(root, "test/b/0.png", b"text")
    message = refusal(root, skip_unreadable=True)
    assert message == f"{root / 'test' / 'b'} has no readable images: every class needs at least 1"


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
