import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cnn_jax.data.cache import ImageCache
from cnn_jax.files import temporary_directory

READABLE = np.ones(6, bool)


def images(value=0):
    return np.full((6, 10, 10, 1), value, np.uint8)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "some" / "cache"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_put_and_get(directory):
    cache = ImageCache(directory)
    assert cache.get("a", 6) is None
    cache.put("a", images(7), READABLE)
    found, readable = cache.get("a", 6)
    np.testing.assert_array_equal(found, images(7))
    np.testing.assert_array_equal(readable, READABLE)
    assert cache.get("b", 6) is None
    assert cache.get("a", 7) is None


def test_private_to_the_user(directory):
    ImageCache(directory).put("a", images(), READABLE)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o770)
    assert ImageCache(directory).get("a", 6) is None
    ImageCache(directory).put("b", images(), READABLE)
    assert names(directory) == ["a.npy"]


def test_links_and_pipes_are_not_read(directory):
    cache = ImageCache(directory)
    cache.put("a", images(), READABLE)
    (directory / "link.npy").symlink_to(directory / "a.npy")
    os.mkfifo(directory / "pipe.npy")
    assert cache.get("link", 6) is None
    assert cache.get("pipe", 6) is None


def test_least_recently_used_entries_are_removed(directory):
    cache = ImageCache(directory, max_bytes=3500)  # less than four entries
    for age, name in enumerate("cba", start=1):
        cache.put(name, images(), READABLE)
        os.utime(directory / f"{name}.npy", (age, age))
    assert cache.get("c", 6)
    size = (directory / "a.npy").stat().st_size
    ImageCache(directory, max_bytes=3 * size).put("d", images(), READABLE)
    assert names(directory) == ["a.npy", "c.npy", "d.npy"]
    ImageCache(directory, max_bytes=size).put("e", images(), READABLE)
    assert names(directory) == ["e.npy"]


def test_entries_larger_than_the_cache_are_not_stored(directory):
    cache = ImageCache(directory, max_bytes=10_000)
    cache.put("a", images(), READABLE)
    cache.put("b", np.zeros((6, 100, 100, 1), np.uint8), READABLE)
    assert names(directory) == ["a.npy"]


def test_temporary_files_of_a_killed_process_are_removed(directory):
    cache = ImageCache(directory)
    cache.put("a", images(), READABLE)
    (directory / ".cnn_jax-0123456789abcdef").mkdir()
    (directory / ".cnn_jax-0123456789abcdef" / "b.npy").write_bytes(b"half")
    cache.put("b", images(), READABLE)
    assert names(directory) == ["a.npy", "b.npy"]


def test_temporary_files_of_a_running_process_are_kept(directory):
    cache = ImageCache(directory)
    cache.put("a", images(), READABLE)
    with temporary_directory(directory):  # holds the lock, as another process would
        (directory / ".cnn_jax-fedcba9876543210").mkdir()
        cache.put("b", images(), READABLE)
        assert ".cnn_jax-fedcba9876543210" in names(directory)


def test_concurrent_writers(directory):
    cache = ImageCache(directory)
    cache.put("a", images(), READABLE)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: cache.put("a", images(), READABLE), range(40)):
            assert [name for name in names(directory) if not name.startswith(".cnn_jax-")] == ["a.npy"]
            assert cache.get("a", 6)
    assert names(directory) == ["a.npy"]
