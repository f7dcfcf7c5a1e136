import contextlib
import hashlib
import io
import itertools
import logging
import os
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.data import folder
from cnn_jax.errors import UsageError
from cnn_jax.files import user_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pictures"


def put(root, name, image, **options):
    """Write an image, or the bytes that are given for one."""
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


def grey(value, size=(4, 3)):
    return np.full(size, value, np.uint8)


def put_split(root, counts, image=grey):
    """Images of each class of both parts; the first pixels number them."""
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


# What is found


def test_train_and_test(root, capfd, caplog):
    put_split(root, {"train": {"dog": 2, "cat": 3}, "test": {"dog": 1, "cat": 2}})
    dataset = load(root)
    assert dataset.name == f"folder:{root}"
    assert dataset.class_names == ("cat", "dog")
    assert dataset.image_shape == (4, 3, 1)
    for split, labels in ((dataset.train, [0, 0, 0, 1, 1]), (dataset.test, [0, 0, 1])):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.labels.tolist() == labels
    assert numbers(dataset.train) == [2, 3, 4, 0, 1]
    assert numbers(dataset.test) == [6, 7, 5]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_a_fifth_of_each_class_is_held_out(root):
    sizes = {"a": 20, "b": 10, "c": 2, "d": 3}
    put_split(root, {".": sizes})
    dataset = load(root, seed=3)
    assert np.bincount(dataset.test.labels).tolist() == [4, 2, 1, 1]
    assert np.bincount(dataset.train.labels).tolist() == [16, 8, 1, 2]
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == list(range(35))
    classes = np.repeat(range(4), list(sizes.values()))
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.labels, classes[numbers(split)])
        assert sorted(split.labels) != split.labels.tolist()  # in random order
    again, other = load(root, seed=3), load(root, seed=4)
    assert numbers(again.test) == numbers(dataset.test)
    assert numbers(again.train) == numbers(dataset.train)
    assert set(numbers(other.test)) != set(numbers(dataset.test))


def test_held_out_the_same_on_every_supported_version(root):
    put_split(root, {".": {"a": 10, "b": 10}})
    assert numbers(load(root, seed=1).test) == [1, 10, 18, 7]


def test_a_relative_path_becomes_absolute(root, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    monkeypatch.chdir(root.parent)
    assert load("pictures").name == load("./pictures/").name == f"folder:{root}"
    monkeypatch.setenv("HOME", str(root.parent))
    assert load("~/pictures").name == f"folder:{root}"


def test_hidden_files_and_what_lies_beside_the_classes_is_passed_over(root):
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    for name in ("README", "train/labels.csv", "train/a/.DS_Store", "test/b/Thumbs.db", "test/b/desktop.ini"):
        put(root, name, b"text")
    for name in ("val/z/0.png", ".git/x/0.png", "train/.cache/0.png"):
        put(root, name, grey(9))
    dataset = load(root)
    assert dataset.class_names == ("a", "b")
    assert (numbers(dataset.train), numbers(dataset.test)) == ([0, 1], [2, 3])


def test_a_class_may_be_called_train(root):
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
        "jpeg-in-fact.png": {"format": "JPEG"},
    }
    for part in ("train", "test"):
        for name in ("a", "b"):
            for file, options in kinds.items():
                put(root, f"{part}/{name}/{file}", picture, **options)
    dataset = load(root)
    assert dataset.train.images.shape == dataset.test.images.shape == (10, 6, 5, 3)
    for index in (0, 2, 3):
        np.testing.assert_array_equal(dataset.train.images[index], np.asarray(picture))


def test_colour_if_any_is_colour(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    assert load(root).image_shape == (4, 3, 1)
    put(root, "b/colour.png", np.full((4, 3, 3), [255, 0, 0], np.uint8))
    assert load(root).image_shape == (4, 3, 3)
    assert load(root, channels=1).image_shape == (4, 3, 1)
    assert 76 in numbers(load(root, channels=1).train) + numbers(load(root, channels=1).test)


def test_grey_in_three_channels(root):
    put_split(root, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    dataset = load(root, channels=3)
    np.testing.assert_array_equal(dataset.train.images, np.stack([grey(0), grey(1)])[..., np.newaxis].repeat(3, axis=3))


def test_brought_to_a_size(root):
    put(root, "a/0.png", grey(10, (8, 9)))
    put(root, "a/1.png", grey(10, (3, 2)))
    put(root, "b/0.jpg", grey(10, (50, 30)))
    put(root, "b/1.webp", Image.fromarray(grey(10, (4, 4))))
    dataset = load(root, image_size=(6, 5), channels=1)
    assert dataset.image_shape == (6, 5, 1)
    np.testing.assert_allclose(np.concatenate([dataset.train.images, dataset.test.images]), 10, atol=2)


def test_sizes_that_differ(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/zebra.png", grey(0, (5, 3)))
    message = refusal(root)
    assert message.startswith(f"the images of {root} differ in height and width, such as 4x3 (a/000.png) and 5x3")
    assert "(b/zebra.png): " in message
    assert message.endswith("such as --image-size 64 64")


def test_sizes_are_compared_as_seen(root):
    sideways = Image.Exif()
    sideways[0x0112] = 6
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/turned.jpg", grey(0, (3, 4)), exif=sideways)
    assert load(root).image_shape == (4, 3, 1)


def test_settings_of_folders_alone(root, tmp_path):
    for settings in ({"image_size": (4, 4)}, {"channels": 1}, {"skip_unreadable": True}):
        (name,) = settings
        for dataset in ("digits", "auto", "tfds:cifar10", "fashion_mnist"):
            with pytest.raises(UsageError, match=f"^{name} is for folder:PATH alone, not for {dataset}: leave it out$"):
                data.load(Config(dataset=dataset, data_dir=str(tmp_path), **settings))


# What cannot be read


@pytest.fixture
def spoilt(root):
    put_split(root, {".": {"a": 5, "b": 5}})
    put(root, "a/text.png", b"text")
    put(root, "a/truncated.png", put(root, "b/000.png", grey(5)).read_bytes()[:45])
    put(root, "b/annotation.txt", b"text")
    put(root, "b/folder/0.png", grey(1))
    return root


def test_unreadable_files_are_named(spoilt):
    assert refusal(spoilt) == (
        f"cannot read {spoilt / 'b' / 'folder'}: not a regular file; remove it or use --skip-unreadable"
    )
    (spoilt / "b" / "folder").rename(spoilt / ".folder")
    for name, wrong in {
        "a/text.png": "is not a PNG, JPEG, WebP or BMP image",
        "b/annotation.txt": "is not a PNG, JPEG, WebP or BMP image",
        "a/truncated.png": "cannot be decoded: ",
    }.items():
        message = refusal(spoilt)
        assert message.startswith(f"{spoilt / name} {wrong}")
        assert message.endswith("; remove it or use --skip-unreadable")
        (spoilt / name).rename(spoilt / f".{name.replace('/', '-')}")
    assert len(load(spoilt).train) == 8


def test_unreadable_files_are_left_out_and_counted_each_time(spoilt, caplog):
    for _ in range(2):
        dataset = load(spoilt, skip_unreadable=True)
        assert sorted(numbers(dataset.train) + numbers(dataset.test)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("cnn_jax", logging.WARNING)
        assert record.getMessage() == (
            f"left out 4 of the 14 files of {spoilt}, which cannot be read as images, the first of them "
            f"{spoilt / 'a' / 'text.png'}"
        )
        caplog.clear()
    assert "b/folder: not a regular file" in refusal(
        spoilt
    )  # what was kept of the one setting is not used for the other


def test_nothing_left_of_a_class(root, caplog):
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 2}})
    put(root, "test/b/0.png", b"text")
    message = refusal(root, skip_unreadable=True)
    assert message == f"{root / 'test' / 'b'} holds too few images that can be read, 0: every class needs at least 1"


def test_nothing_left_at_all(root):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        put(root, name, b"text")
    assert refusal(root, skip_unreadable=True) == f"none of the 4 files of {root} can be read as an image"
    assert "holds too few images" in refusal(root, skip_unreadable=True, image_size=(4, 4))


def test_a_bomb(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    header = bytearray(put(root, "b/bomb.png", grey(0)).read_bytes())
    header[16:24] = b"\0\0\xff\xff\0\0\xff\xff"
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    put(root, "b/bomb.png", bytes(header))
    for settings in ({}, {"image_size": (4, 4)}, {"image_size": (4, 4), "channels": 3}):
        assert refusal(root, **settings).startswith(f"{root / 'b' / 'bomb.png'} is too large")


def test_names_that_a_terminal_would_obey(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(root, "b/\x1b[31m\nred.png", b"text")
    assert r"b/\x1b[31m\nred.png is not a PNG" in refusal(root)
    (root / "c\n").mkdir()
    put(root, "c\n/0.png", grey(0))
    assert refusal(root) == rf"{root}: c\n cannot be printed as a class's name: rename the folder"


@contextlib.contextmanager
def unprivileged():
    """Makes the process one that permissions bind, as they do not root's."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_permission():
    with tempfile.TemporaryDirectory() as name:  # one that is not root's own
        root = Path(name)
        root.chmod(0o755)
        put_split(root, {".": {"a": 2, "b": 2}})
        load(root)  # so that all is imported, which perhaps lies where root alone can read
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
        ("missing", "cannot read the folder {}: No such file or directory; give another as folder:PATH"),
        ("file", "cannot read the folder {}: Not a directory; give another as folder:PATH"),
    ],
)
def test_no_folder(tmp_path, path, wrong):
    put(tmp_path, "file", b"text")
    assert refusal(tmp_path / path) == wrong.format(tmp_path / path)


def test_nobodys_home():
    assert refusal("~nobody-of-this-name/x").startswith("the home directory in ~nobody-of-this-name/x is unknown: ")


@pytest.mark.parametrize("name", ["folder:", "folder"])
def test_no_path(name):
    with pytest.raises(UsageError, match=rf"unknown data set '{name}'; did you mean 'folder:PATH'\?; data sets: .*"):
        data.load(Config(dataset=name))


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ([], "{} holds no folders of images: two or more are needed, each in a folder of its name"),
        (["0.png", "1.png"], "{} holds no folders of images: two or more"),
        (["a/0.png", "a/1.png"], "{} holds one class alone, a: two or more are needed"),
        (["train/a/0.png", "test/a/1.png"], "{} holds one class alone, a: two or more are needed"),
        (["train/0.png", "test/1.png"], "{} holds no folders of images: two or more"),
        (
            ["a/0.png", "b/0.png", "b/1.png"],
            "{}/a holds too few images that can be read, 1: every class needs at least 2",
        ),
        (["a/0.png", "a/1.png", "b/.hidden"], "{}/b holds too few images that can be read, 0: every class"),
        (["train/a/0.png", "train/b/0.png"], "{0} has train/ and no test/: add it, or give folder:{0}/train to have"),
        (["test/a/0.png", "test/b/0.png", "train"], "{0} has test/ and no train/: add it, or give folder:{0}/test to"),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png"],
            "the classes in {0}/train and {0}/test must be the same: b is in train/ alone",
        ),
        (
            ["train/a/0.png", "train/b/0.png", *(f"test/{name}/0.png" for name in "abcdef")],
            "the classes in {0}/test and {0}/train must be the same: c, d, e, ... are in test/ alone",
        ),
        (
            ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/.hidden"],
            "{}/test/b holds too few images that can be read, 0: every class needs at least 1",
        ),
    ],
)
def test_folders_of_another_form(root, files, wrong):
    root.mkdir()
    for file in files:
        put(root, file, grey(0) if file.endswith(".png") else b"")
    assert refusal(root).startswith(wrong.format(root))


def test_more_than_there_is_memory(root, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    monkeypatch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError))
    assert refusal(root, image_size=(9000, 9000)) == (
        f"the images of {root} are 4x9000x9000x1 bytes, for which there is no memory: give a smaller --image-size"
    )


# What is kept


@pytest.fixture
def kept(root):
    """A folder whose images have been decoded, and the file they are kept in."""
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    load(root)
    (cache,) = (user_cache() / "folders").iterdir()
    return root, cache


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded from now on."""
    paths = []
    read = folder.read_image
    monkeypatch.setattr(
        folder, "read_image", lambda path, *args, **options: paths.append(path) or read(path, *args, **options)
    )
    return paths


def test_the_second_time_nothing_is_decoded(kept, decoded, monkeypatch):
    root, _ = kept
    for reader in ("image_size", "is_colour"):
        monkeypatch.setattr(folder, reader, lambda path: pytest.fail("read again"))
    dataset = load(root)
    assert decoded == []
    assert (numbers(dataset.train), numbers(dataset.test)) == ([0, 1, 2, 3], [4, 5])
    assert dataset.train.images.shape == (4, 4, 3, 1)
    root.rename(root.with_name("moved"))
    assert load(root.with_name("moved"), seed=5).name == f"folder:{root.with_name('moved')}"
    assert decoded == []


def test_whatever_changes_is_decoded_anew(kept, decoded):
    root, _ = kept
    path = root / "train" / "b" / "001.png"
    content = path.read_bytes()
    changed = put(root, path, grey(200)).read_bytes()
    assert len(changed) == len(content)
    assert numbers(load(root).train) == [0, 1, 2, 200]
    assert len(decoded) == 6
    path.write_bytes(content)
    assert numbers(load(root).train) == [0, 1, 2, 3]
    assert len(decoded) == 6
    path.rename(path.with_name("!.png"))
    assert numbers(load(root).train) == [0, 1, 3, 2]
    assert len(decoded) == 12
    for settings in ({"channels": 3}, {"image_size": (2, 2)}, {"image_size": (2, 2), "channels": 3}):
        before = len(decoded)
        assert load(root, **settings).image_shape == (*settings.get("image_size", (4, 3)), settings.get("channels", 1))
        assert len(decoded) == before + 6


def test_another_pillow_may_decode_otherwise(kept, decoded, monkeypatch):
    root, _ = kept
    monkeypatch.setattr("PIL.__version__", "99.0.0")
    load(root)
    assert len(decoded) == 6


def arrays(images, readable):
    buffer = io.BytesIO()
    sha256 = hashlib.sha256(images.tobytes() + readable.tobytes()).digest()
    for array in (images, readable, np.frombuffer(sha256, np.uint8)):
        np.save(buffer, array)
    return buffer.getvalue()


class Hostile:
    def __reduce__(self):
        return (os.abort, ())


GOOD = {"images": np.zeros((6, 4, 3, 1), np.uint8), "readable": np.ones(6, bool)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"text",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(bytes([3] * 12), bytes([3] * 11 + [4])),
        lambda content: arrays(**GOOD)[:-160],
        lambda content: arrays(**GOOD)[:-1] + b"x",
        lambda content: arrays(**GOOD | {"images": np.zeros((5, 4, 3, 1), np.uint8)}),
        lambda content: arrays(**GOOD | {"images": np.zeros((6, 4, 3, 1), np.int8)}),
        lambda content: arrays(**GOOD | {"images": np.zeros((6, 4, 3), np.uint8)}),
        lambda content: arrays(**GOOD | {"readable": np.ones(7, bool)}),
        lambda content: arrays(**GOOD | {"readable": np.ones(6, np.uint8)}),
        lambda content: arrays(**GOOD | {"images": np.array([Hostile()], object)}),
    ],
)
def test_a_damaged_cache_is_made_anew(kept, decoded, damage, caplog, capfd):
    root, cache = kept
    content = cache.read_bytes()
    cache.write_bytes(damage(content))
    assert cache.read_bytes() != content
    for _ in range(2):
        dataset = load(root)
        assert (numbers(dataset.train), numbers(dataset.test)) == ([0, 1, 2, 3], [4, 5])
        assert len(decoded) == 6
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert list(cache.parent.iterdir()) == [cache]


def test_a_cache_that_cannot_be_written_is_no_error(root, tmp_path, monkeypatch, caplog, capfd):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(tmp_path, "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(root).train) == 2
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_leaves_nothing_behind(root, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})

    def fill(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fill)
    assert len(load(root).train) == 2
    assert list((user_cache() / "folders").iterdir()) == []


def test_a_cache_that_others_can_write_to_is_not_used(kept, decoded):
    root, cache = kept
    load(root)
    assert decoded == []
    cache.parent.chmod(0o777)
    load(root)
    assert len(decoded) == 6


@pytest.fixture(scope="module")
def open_events():
    """A list of functions that are called with each path that is opened, before it is."""
    functions = []

    def hook(event, args):
        if event == "open" and functions:
            for function in functions:
                function(str(args[0]))

    sys.addaudithook(hook)  # which cannot be removed again
    return functions


@pytest.fixture
def before_opening(open_events):
    """Has something done when a file is about to be opened for the ``count``-th time."""

    def before(path, count, action):
        times = itertools.count(1)
        open_events.append(lambda opened: opened == str(path) and next(times) == count and action())

    yield before
    open_events.clear()


@pytest.mark.parametrize("settings", [{"image_size": (4, 3), "channels": 1}, {}])
def test_what_changes_between_hashing_and_decoding_is_not_kept(root, before_opening, settings):
    put_split(root, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    path = root / "train" / "b" / "001.png"
    content = path.read_bytes()
    status = path.stat()

    def change():
        with path.open("r+b") as file:
            file.write(encoded(grey(200)))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    before_opening(path, 2 if settings else 4, change)
    assert numbers(load(root, **settings).train) == [0, 1, 2, 200]
    path.write_bytes(content)
    assert numbers(load(root, **settings).train) == [0, 1, 2, 3]
    put(root, path, grey(200))
    assert numbers(load(root, **settings).train) == [0, 1, 2, 200]


def test_what_becomes_readable_meanwhile_is_not_kept(root, before_opening):
    put_split(root, {".": {"a": 3, "b": 3}})
    path = root / "a" / "001.png"
    path.rename(root / "aside")
    path.mkdir()

    def mend():
        path.rmdir()
        (root / "aside").rename(path)

    settings = {"image_size": (4, 3), "channels": 1, "skip_unreadable": True}
    before_opening(path, 2, mend)
    load(root, **settings)
    path.rename(root / "aside")
    path.mkdir()
    dataset = load(root, **settings)
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == [0, 2, 3, 4, 5]


def test_a_pipe_or_a_huge_file_is_left_out(root):
    put_split(root, {".": {"a": 2, "b": 2}})
    os.mkfifo(root / "a" / "pipe.png")
    with (root / "b" / "huge.png").open("wb") as file:
        file.truncate(200 * 10**9)
    assert "pipe.png: not a regular file; remove it or use --skip-unreadable" in refusal(root)
    dataset = load(root, skip_unreadable=True)
    assert sorted(numbers(dataset.train) + numbers(dataset.test)) == [0, 1, 2, 3]


# What is seen meanwhile


def test_a_bar_on_a_terminal_alone(root, monkeypatch, capfd):
    put_split(root, {".": {"a": 2, "b": 2}})
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    load(root)
    for words in ("reading images", "measuring images", "looking for colours", "decoding images", "4/4"):
        assert words in terminal.getvalue()
    assert capfd.readouterr().out == ""


def test_pillows_warnings_are_not_heard(root, capfd):
    # A thousand fractions that are not there.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\xe8\x03\0\0\x08\0\0\0\0\0\0\0"
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        put(root, name, grey(7), exif=exif)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert numbers(load(root).train) == [7, 7]
    assert heard == []
    assert capfd.readouterr() == ("", "")
