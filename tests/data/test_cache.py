import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cnn_jax.data.cache import ImageCache
from cnn_jax.files import temporary_directory


def digest(value):
    return hashlib.sha256(bytes([value])).digest()


def image(value=0, channels=1):
    return np.full((10, 10, channels), value, np.uint8)


def store(directory, values, settings=0, channels=1, **options):
    """Gather images of constant values, after adding the missing ones; return the array and which were missing."""
    missing = []
    with ImageCache(directory, settings, **options) as cache:
        for value in values:
            if cache.find(digest(value)) is None:
                cache.add(digest(value), image(value))
                missing.append(value)
        return cache.gather([digest(value) for value in values], (10, 10, channels)), missing


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "some" / "cache"


def entries(directory):
    return {path for path in directory.iterdir() if not path.name.startswith(".")}


def test_images_are_found_by_their_digest_and_settings(directory):
    for settings, missing in ((0, [1, 2, 3]), (0, []), (1, [1, 2, 3]), (1, [])):
        images, added = store(directory, [1, 2, 3], settings)
        assert images.dtype == np.uint8
        assert images.shape == (3, 10, 10, 1)
        assert images[:, 5, 5, 0].tolist() == [1, 2, 3]
        assert added == missing
    assert len(entries(directory)) == 2
    assert store(directory, [4, 1, 1])[1] == [4]
    images, missing = store(directory, [3, 4, 2])  # from two entries
    assert images[:, 5, 5, 0].tolist() == [3, 4, 2]
    assert missing == []


def test_gray_images_in_color(directory):
    with ImageCache(directory, 0) as cache:
        cache.add(digest(1), image(1))
        cache.add(digest(2), color := image(0, 3) + np.arange(3, dtype=np.uint8))
        images = cache.gather([digest(1), digest(2)], (10, 10, 3))
    np.testing.assert_array_equal(images, [image(1, 3), color])
    with ImageCache(directory, 0) as cache:
        np.testing.assert_array_equal(cache.find(digest(1)), image(1))
        np.testing.assert_array_equal(cache.find(digest(2)), color)
    for channels in (1, 3, 1):
        assert store(directory, [1], channels=channels)[0].shape == (1, 10, 10, channels)


def test_private_to_the_user(directory):
    store(directory, [1])
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o022 for path in entries(directory)] == [0]
    directory.chmod(0o770)
    images, missing = store(directory, [1])
    assert missing == [1]
    assert not images.flags.writeable
    assert store(directory, [2])[0][0, 0, 0] == 2
    assert len(entries(directory)) == 1


def test_a_damaged_image_is_missing_in_this_entry_only(directory):
    store(directory, [1, 2, 3])
    (first,) = entries(directory)
    store(directory, [3, 2])
    (second,) = entries(directory) - {first}
    for damaged, expected in (([first], []), ([first, second], [2])):
        for path in damaged:
            content = path.read_bytes()
            assert bytes([2]) * 100 in content
            path.write_bytes(content.replace(bytes([2]) * 100, bytes([2]) * 99 + bytes([7])))
        images, missing = store(directory, [1, 2, 3])
        assert (images == np.array([1, 2, 3]).reshape(3, 1, 1, 1)).all()
        assert missing == expected


def test_least_recently_used_entries_are_removed(directory):
    paths = {}
    for age, name in enumerate("cba", start=1):
        before = entries(directory) if directory.exists() else set()
        store(directory, range(6), settings=name)
        (paths[name],) = entries(directory) - before
        os.utime(paths[name], (age, age))
    store(directory, range(6), settings="c")
    size = paths["a"].stat().st_size
    store(directory, range(6), settings="d", max_bytes=3 * size)
    assert entries(directory) >= {paths["a"], paths["c"]}
    assert len(entries(directory)) == 3
    store(directory, range(6), settings="e", max_bytes=size)
    assert len(entries(directory)) == 1
    assert store(directory, range(6), settings="e")[1] == []


def test_an_entry_larger_than_the_cache_is_kept_alone(directory):
    store(directory, [1])
    store(directory, range(6), max_bytes=100)
    assert len(entries(directory)) == 1
    assert store(directory, range(6))[1] == []


def test_entries_of_other_versions_count(directory):
    store(directory, [1])
    old = directory / "0123456789abcdef.npy"
    old.write_bytes(bytes(5000))
    os.utime(old, (1, 1))
    store(directory, [2], max_bytes=4000)
    assert old not in entries(directory)
    assert len(entries(directory)) == 2


def test_temporary_files_of_a_killed_process_are_removed(directory):
    store(directory, [1])
    (directory / ".cnn_jax-0123456789abcdef").mkdir()
    (directory / ".cnn_jax-0123456789abcdef" / "x.images").write_bytes(b"half")
    store(directory, [2])
    assert set(directory.iterdir()) == entries(directory)


def test_temporary_files_of_a_running_process_are_kept(directory):
    store(directory, [1])
    with temporary_directory(directory):  # holds the lock, as another process would
        (directory / ".cnn_jax-fedcba9876543210").mkdir()
        store(directory, [2])
        assert (directory / ".cnn_jax-fedcba9876543210").exists()


def test_concurrent_writers(directory):
    with ThreadPoolExecutor(8) as pool:
        for images, _ in pool.map(lambda number: store(directory, [number % 3, 3, 4], max_bytes=1500), range(40)):
            assert images[1:, 5, 5, 0].tolist() == [3, 4]
    assert set(directory.iterdir()) == entries(directory)
    assert sum(path.stat().st_size for path in entries(directory)) <= 1500


def test_added_from_several_threads(directory):
    with ImageCache(directory, 0) as cache:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda value: cache.add(digest(value), image(value)), range(200)))
        images = cache.gather([digest(value) for value in range(200)], (10, 10, 1))
    np.testing.assert_array_equal(images, [image(value) for value in range(200)])


def test_an_added_image_that_is_lost_is_an_error(directory):
    with ImageCache(directory, 0) as cache:
        cache.add(digest(1), image(1))
        cache.add(digest(2), image(2))
        cache._temporary.truncate(150)  # as on a network file system, where a full disk is reported later
        np.testing.assert_array_equal(cache.find(digest(1)), image(1))
        with pytest.raises(OSError, match="Input/output error"):
            cache.gather([digest(1), digest(2)], (10, 10, 1))
    assert entries(directory) == set()
