"""Images that are decoded whenever they are read: as an array of them, and from folders."""

import threading
import time

import numpy as np
import pytest
from folders import cache_files, encoded, gray, load, put, put_split, refusal
from PIL import Image

from cnn_jax.data import background
from cnn_jax.data.statistics import channel_sums, mean_and_std
from cnn_jax.data.store import ChangedImageError, ImageStore, _DoesNotFitError
from cnn_jax.data.streamed import StreamedImages, in_order

ARRAY = np.random.default_rng(0).integers(0, 256, (50, 5, 4, 3), np.uint8)


def streamed(array=ARRAY, decode=None):
    sums = np.stack([channel_sums(image) for image in array])
    return StreamedImages(decode or array.__getitem__, array.shape[1:], sums)


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(3, 40, 7), slice(0, 0), np.array([4, 4, 1]), np.arange(50) % 3 == 0, slice(None, None, -1)],
)
def test_selected_as_in_an_array(index):
    images = streamed()[10:][::-1]
    expected = ARRAY[10:][::-1]
    if isinstance(index, np.ndarray) and index.dtype == bool:
        index = index[:40]
    selected = images[index]
    assert isinstance(selected, StreamedImages)
    assert (len(selected), selected.shape, selected.dtype) == (len(expected[index]), expected[index].shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(selected), expected[index])
    np.testing.assert_array_equal(list(selected), list(expected[index]))
    np.testing.assert_array_equal(np.asarray(selected, np.float32), expected[index])


def test_one_image_and_indices_out_of_range():
    np.testing.assert_array_equal(streamed()[-1], ARRAY[-1])
    np.testing.assert_array_equal(streamed()[np.int32(7)], ARRAY[7])
    for index in (50, -51, [50]):
        with pytest.raises(IndexError):
            streamed()[index]


def test_selecting_decodes_nothing():
    calls = []
    images = streamed(decode=lambda number: calls.append(number) or ARRAY[number])[::2]
    assert calls == []
    reader = images[:20].ahead(4)
    reader.read_into(np.empty((2, *ARRAY.shape[1:]), np.uint8))
    time.sleep(0.1)
    reader.close()
    assert set(calls) <= set(range(0, 40, 2))
    assert len(calls) < 20  # not far ahead
    assert sorted(calls) == sorted(set(calls))


def test_the_order_is_kept_if_later_images_are_decoded_first():
    def decode(number):
        time.sleep(0.02 if number % 4 == 0 else 0)
        return ARRAY[number]

    np.testing.assert_array_equal(np.asarray(streamed(decode=decode)), ARRAY)


def test_images_are_decoded_ahead_in_several_threads():
    threads = set()
    both = threading.Barrier(2)

    def decode(number):
        threads.add(threading.get_ident())
        if number in (0, 1):
            both.wait(10)  # fails if one thread decodes both
        return ARRAY[number]

    reader = streamed(decode=decode).ahead(2)
    for _ in range(100):
        if len(threads) > 1:
            break
        time.sleep(0.05)
    assert threading.get_ident() not in threads
    reader.close()


def test_an_error_is_raised_at_the_turn_of_the_image():
    def decode(number):
        if number == 20:
            raise ChangedImageError("gone")
        return ARRAY[number]

    images = iter(streamed(decode=decode))
    for number in range(16):
        np.testing.assert_array_equal(next(images), ARRAY[number])
    with pytest.raises(ChangedImageError, match=r"^gone\b"):
        list(images)


def test_too_few_images_are_an_error():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        streamed()[:3].ahead().read_into(np.empty((4, *ARRAY.shape[1:]), np.uint8))


@pytest.mark.parametrize("counts", [[], [50], [7, 0, 20, 23]])
def test_read_in_order_as_an_array(counts):
    for images in (ARRAY, streamed()):
        reader = in_order(images, 8)
        for start, count in zip(np.cumsum([0, *counts]), counts, strict=False):
            out = np.empty((count, *ARRAY.shape[1:]), np.uint8)
            reader.read_into(out)
            np.testing.assert_array_equal(out, ARRAY[start : start + count])


def test_a_copy_cannot_be_avoided():
    with pytest.raises(ValueError, match="have to be decoded"):
        np.asarray(streamed(), copy=False)


def test_statistics_are_those_of_the_array():
    selection = np.random.default_rng(1).permutation(50)[:30]
    assert mean_and_std(streamed()[selection]) == mean_and_std(ARRAY[selection])
    dark = ARRAY // 8
    assert background.is_dark(streamed(dark))
    assert not background.is_dark(streamed())


def mixed(root):
    """Gray and color images, with a palette, transparency and an orientation, in three splits."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("val", 6), ("test", 9)):
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
            kind = ("RGB", "L", "P", "LA", "RGBA", "I;16")[number % 6]
            if kind == "I;16":
                image = Image.fromarray(rng.integers(0, 1 << 16, (20, 30), np.uint16))
            else:
                image = image.convert(kind)
            put(root, f"{part}/{'ab'[number % 2]}/{number:02}.png", image)
        exif = Image.Exif()
        exif[0x0112] = 6
        put(root, f"{part}/a/photo.jpg", rng.integers(0, 256, (30, 20, 3), np.uint8), exif=exif)


def assert_same(dataset, other):
    """Fail unless two datasets have the same examples in the same order."""
    assert dataset.sha256 == other.sha256
    assert dataset.splits.keys() == other.splits.keys()
    for name, split in dataset.splits.items():
        for field in ("labels", "files", "digests"):
            np.testing.assert_array_equal(getattr(split, field), getattr(other.splits[name], field))
        np.testing.assert_array_equal(np.asarray(split.images), np.asarray(other.splits[name].images))
        assert mean_and_std(split.images) == mean_and_std(other.splits[name].images)


@pytest.mark.parametrize(
    "settings", [{}, {"channels": 1}, {"image_size": (9, 12)}, {"image_size": (8, 8), "fit": "crop"}]
)
def test_a_folder_is_the_same_dataset_whether_it_is_kept_or_not(root, settings):
    mixed(root)
    once = load(root, cache_limit=0, **settings)
    again = load(root, cache_limit=0, **settings)
    kept = load(root, **settings)
    for dataset in (once, again):
        assert all(isinstance(split.images, StreamedImages) for split in dataset.splits.values())
        assert_same(dataset, kept)
    assert all(isinstance(split.images, np.ndarray) for split in kept.splits.values())


@pytest.mark.parametrize("settings", [{}, {"split_seed": 1}, {"validation_fraction": 0.3}])
def test_held_out_images_are_the_same(root, settings):
    put_split(root, {".": {"a": 40, "b": 40}})
    assert_same(load(root, cache_limit=0, **settings), load(root, **settings))


def test_gray_images_when_the_first_in_color_comes(root):
    put_split(root, {".": {"a": 6, "b": 6}})
    load(root, cache_limit=0)
    put(root, "a/color.png", np.full((4, 3, 3), [255, 0, 0], np.uint8))
    assert_same(load(root, cache_limit=0), load(root))


def test_known_images_are_not_decoded_when_a_folder_is_loaded_again(root, decoded, monkeypatch):
    put_split(root, {".": {"a": 5, "b": 5}})
    load(root, cache_limit=0)
    decoded.clear()
    root = root.rename(root.with_name("moved"))
    changed = put(root, "a/000.png", gray(200))
    new = put(root, "b/new.png", gray(201))
    # The first images are decoded until it is known how much space all of them would take.
    monkeypatch.setattr(ImageStore, "_keep", lambda store: (_ for _ in ()).throw(_DoesNotFitError))
    dataset = load(root, split_seed=3)
    assert decoded == [changed, new]
    assert sorted(numbers_of(dataset)) == sorted([*range(1, 10), 200, 201])


def numbers_of(dataset):
    return [number for split in dataset.splits.values() for number in np.asarray(split.images)[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:-33] + bytes([content[-33] ^ 1]) + content[-32:],
        lambda content: content + b"x",
        lambda content: bytes(32),
    ],
)
def test_damaged_summaries_are_replaced(root, damage):
    put_split(root, {".": {"a": 5, "b": 5}})
    expected = load(root)
    (images,) = cache_files()
    images.unlink()
    load(root, cache_limit=0)
    (summaries,) = cache_files()
    content = summaries.read_bytes()
    summaries.write_bytes(damage(content))
    assert_same(load(root, cache_limit=0), expected)
    assert summaries.read_bytes() == content


def test_a_limit_below_the_size_of_kept_images(kept):
    root, _ = kept
    expected = load(root)
    assert isinstance(load(root, cache_limit=72e-9).train.images, np.ndarray)
    dataset = load(root, cache_limit=71e-9)
    assert isinstance(dataset.train.images, StreamedImages)
    assert_same(dataset, expected)


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_images_that_cannot_be_read(root, caplog, skip_unreadable):
    put_split(root, {".": {"a": 20, "b": 20}})
    content = encoded(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8))
    damaged = put(root, "b/damaged.png", content[: len(content) // 2])
    settings = {"cache_limit": 0, "image_size": (4, 3)}
    if not skip_unreadable:
        assert refusal(root, **settings).startswith(f"{damaged} cannot be decoded: ")
        return
    dataset = load(root, skip_unreadable=True, **settings)
    assert sorted(numbers_of(dataset)) == list(range(40))
    assert [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
        f"skipped 1 of the 41 files of {root}, which cannot be read as images; the first is {damaged}"
    ]


def test_images_of_different_sizes(root):
    put_split(root, {".": {"a": 20, "b": 20}})
    put(root, "b/other.png", gray(0, (5, 5)))
    assert refusal(root, cache_limit=0).startswith(f"the images of {root} differ in height and width")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), "cannot read {path}: No such file or directory"),
        (lambda path: path.write_bytes(encoded(gray(99))), "{path} has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "{path} has changed"),
        (lambda path: path.unlink() or path.mkdir(), "cannot read {path}: not a regular file"),
    ],
)
def test_an_image_that_changes(root, change, problem):
    put_split(root, {".": {"a": 20, "b": 20}})
    train = load(root, cache_limit=0).train
    path = root / train.files[3]
    change(path)
    message = f"{problem.format(path=path)}, and is decoded whenever it is used: restore it"
    np.testing.assert_array_equal(train.images[2], np.full((4, 3, 1), numbers_of_file(train, 2)))
    for read in (lambda: train.images[3], lambda: list(train.images)):
        with pytest.raises(ChangedImageError) as caught:
            read()
        assert (str(caught.value), caught.value.exit_status) == (message, 1)


def numbers_of_file(split, index):
    """The number of an image made by ``put_split`` for two classes of 20."""
    folder, name = split.files[index].split("/")
    return 20 * (folder == "b") + int(name.removesuffix(".png"))


def test_an_image_that_is_moved_back_is_read_again(root):
    put_split(root, {".": {"a": 20, "b": 20}})
    images = load(root, cache_limit=0).train.images
    expected = np.asarray(images)
    root.rename(root.with_name("elsewhere"))
    with pytest.raises(ChangedImageError, match="No such file"):
        np.asarray(images)
    root.with_name("elsewhere").rename(root)
    np.testing.assert_array_equal(np.asarray(images), expected)
