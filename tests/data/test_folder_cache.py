"""The images of a folder in the cache, and the space they take."""

import hashlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from folders import cache_files, gray, load, numbers, put, put_split, refusal

from cnn_jax.config import Config
from cnn_jax.data import folder
from cnn_jax.data.cache import ImageCache
from cnn_jax.data.store import ImageStore
from cnn_jax.data.streamed import StreamedImages
from cnn_jax.files import user_cache


def load_streamed(root, caplog, **settings):
    """The dataset, whose images are decoded whenever they are used, and why."""
    caplog.clear()
    caplog.set_level(logging.INFO, "cnn_jax")
    dataset = load(root, **settings)
    assert all(isinstance(split.images, StreamedImages) for split in dataset.splits.values())
    (message,) = (record.getMessage() for record in caplog.records if "decoding" in record.getMessage())
    start = f"decoding the images of {root} whenever they are used: "
    assert message.startswith(start)
    return dataset, message.removeprefix(start)


def assert_equal(dataset, other):
    assert dataset.sha256 == other.sha256
    for name, split in dataset.splits.items():
        np.testing.assert_array_equal(np.asarray(split.images), np.asarray(other.splits[name].images))


@pytest.fixture
def free(monkeypatch):
    """Set the free bytes on the disk and in memory."""

    def set_free(disk, memory):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=disk))
        monkeypatch.setattr("cnn_jax.data.cache.available_memory", lambda: memory)

    return set_free


def test_images_that_do_not_fit_are_not_kept(root, free, caplog):
    put_split(
        root, {".": {"a": 300, "b": 300}}, lambda number: np.full((2, 2, 3), [number // 256, number % 256, 0], np.uint8)
    )
    free(7 * 10**7, 3 * 10**7)
    dataset, reason = load_streamed(root, caplog, image_size=(100, 200), skip_unreadable=True)
    assert reason == "decoded they take 0.04 GB, and the limit is 0.04 GB (--cache-limit)"
    assert [path.suffix for path in cache_files()] == [".summaries"]
    free(10**8, 0)
    assert_equal(dataset, load(root, image_size=(100, 200)))
    # Decoded at another size.
    assert load(root, image_size=(5, 5)).image_shape == (5, 5, 3)


def test_images_in_color_after_gray_ones(root, free, caplog, decoded):
    put_split(root, {".": {"a": 300, "b": 300}}, lambda number: np.resize(divmod(number, 256), (4, 3)).astype(np.uint8))
    put(root, "a/1.png", np.full((4, 3, 3), [255, 0, 0], np.uint8))
    num_bytes = 601 * 12
    free(6 * num_bytes - 1, 6 * num_bytes - 1)
    dataset, reason = load_streamed(root, caplog)
    assert reason.startswith("decoded they take 0.00 GB, and the limit is 0.00 GB")
    assert dataset.image_shape == (4, 3, 3)
    free(6 * num_bytes, 0)  # for the array, and the images while most of them are gray
    assert_equal(dataset, load(root))


def test_images_that_threads_have_already_added_need_no_more_space(root, monkeypatch):
    put_split(root, {".": {"a": 3, "b": 3}})
    read_all = ImageStore._read_all

    def read_ahead(*args):
        yield from list(read_all(*args))

    asked = []
    monkeypatch.setattr(ImageStore, "_read_all", read_ahead)
    monkeypatch.setattr(ImageCache, "has_room", lambda cache, *num_bytes: asked.append(num_bytes) or True)
    load(root)
    assert asked == [(6 * 12, 0)]


@pytest.mark.parametrize(
    ("disk", "memory", "fits"),
    [
        (8, 0, True),
        (7, 0, False),
        (0, 8, True),
        (0, 7, False),
        (6, 3, False),  # the array is in one of them
        (7, 3, False),
        (7, 4, True),
        (2, 6, True),  # part of the decoded images is in memory
        (2, 5, False),
        (100, 0, True),
    ],
)
def test_the_array_is_on_disk_or_in_memory(own_cache, free, disk, memory, fits):
    free(disk, memory)
    with ImageCache(user_cache() / "folders", 0) as cache:
        assert cache.has_room(array_bytes=4, added_bytes=4) == fits


def test_cached_images_need_no_more_space(kept, free, caplog):
    root, _ = kept
    free(0, 7 * 12)  # 7 images
    put_split(root, {"test": {"a": 1}}, lambda number: gray(100))  # another image in its place
    assert len(load(root).test) == 2
    put(root, "test/a/1.png", gray(101))
    assert len(load(root).test) == 3
    put(root, "test/a/2.png", gray(102))
    _, reason = load_streamed(root, caplog)
    assert re.fullmatch(r".* 0.00 GB of disk in .* and 0.00 GB of memory are free", reason)
    (root / "test/a/2.png").unlink()
    free(0, 0)
    assert len(load(root).test) == 3


def test_the_space_for_images(root, tmp_path, free, caplog, monkeypatch):
    put_split(root, {".": {"a": 2, "b": 2}})
    put(tmp_path, "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no cache can be written
    free(10**9, 12)
    dataset, reason = load_streamed(root, caplog)
    assert reason == (
        "decoded they take 0.00 GB, and as much while they are decoded, but 0.00 GB of disk in "
        f"{user_cache()} and 0.00 GB of memory are free"
    )
    free(0, 4 * 2 * 12)
    assert isinstance(load(root).train.images, np.ndarray)
    assert_equal(dataset, load(root))
    _, reason = load_streamed(root, caplog, cache_limit=1e-9)
    assert reason == "decoded they take 0.00 GB, and the limit is 0.00 GB (--cache-limit)"


def test_an_array_that_would_exhaust_memory_is_not_allocated(kept, free, caplog, monkeypatch):
    root, _ = kept
    monkeypatch.setattr(ImageCache, "_write", lambda *args: (_ for _ in ()).throw(OSError("full")))
    free(0, 6 * 12 - 1)
    (root / "train" / "a" / "000.png").rename(root / "train" / "b" / "!.png")  # all images are cached
    (root / "test" / "a" / "000.png").rename(root / "train" / "a" / "0.png")
    put(root, "test/a/0.png", (root / "test" / "b" / "000.png").read_bytes())
    (root / "train" / "b" / "000.png").unlink()
    _, reason = load_streamed(root, caplog)
    assert reason == "they no longer fit on the disk or in memory"


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
    assert isinstance(dataset.train.images, np.ndarray) == fits
    assert [path.suffix for path in cache_files()] == [".images" if fits else ".summaries"]
    assert shutil.disk_usage(small_disk).used <= 30_000 + fits * (1 << 19)


def test_other_entries_are_removed_to_make_room(root, small_disk):
    for values in (range(0, 80), range(80, 160)):
        put_split(root, {".": {"a": 40, "b": 40}}, lambda number, first=values[0]: gray(first + number))
        dataset = load(root, image_size=(60, 60 - values[0] // 8))
        assert isinstance(dataset.train.images, np.ndarray)
    assert len(cache_files()) == 1


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


LIMITED = """
import os, re, resource, sys
from pathlib import Path
import numpy as np
from cnn_jax import data
from cnn_jax.config import Config
from cnn_jax.training.input import ArraySource
from cnn_jax.training.sharding import make_mesh

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # each thread takes memory
config = Config(dataset=sys.argv[1], image_size=(2000, 1000), cache_limit=sys.argv[2])

def total(split):
    source = ArraySource(split, batch_size=4, seed=0, shuffle=True, mesh=make_mesh(), max_chunk_steps=1)
    chunks = (source.chunk(0, step, step + 1).batches for step in range(source.steps_per_epoch))
    return sum(int((np.asarray(chunk.images[..., 0, 0, 0]) * np.asarray(chunk.mask, int)).sum()) for chunk in chunks)

total(data.Split(np.zeros((8, 2000, 1000, 1), np.uint8), np.zeros(8, np.int32)))  # the memory of jax itself
used = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (150 << 20),) * 2)
dataset = data.load(config)
print(total(dataset.train) + total(dataset.test))
try:
    np.ones(dataset.train.images.shape, np.uint8)
except MemoryError:
    print("limited")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of anonymous memory")
@pytest.mark.parametrize("cache_limit", [None, 0])
def test_a_folder_larger_than_memory(root, cache_limit):
    put_split(root, {".": {"a": 60, "b": 60}})
    load(root, image_size=(2000, 1000), cache_limit=cache_limit)
    command = [sys.executable, "-c", LIMITED, f"folder:{root}", str(cache_limit).lower()]
    limited = subprocess.run(command, capture_output=True, text=True, check=True)
    assert limited.stdout.split() == [str(sum(range(120))), "limited"]
