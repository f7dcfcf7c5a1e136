import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest

from cnn_jax.data import idx
from cnn_jax.errors import UsageError

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10
LABELS = np.array([9, 0, 200], np.uint8)


@pytest.fixture(params=["plain", "gzip"])
def write(request, tmp_path):
    def write(content: bytes):
        path = tmp_path / "file"
        path.write_bytes(gzip.compress(content) if request.param == "gzip" else content)
        return path

    return write


def test_images_get_a_channel(write, idx_bytes):
    images = idx.read_images(write(idx_bytes(IMAGES)))
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES[..., np.newaxis])


def test_labels_become_int32(write, idx_bytes):
    labels = idx.read_labels(write(idx_bytes(LABELS)))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [9, 0, 200])


def test_sizes_are_big_endian(write):
    path = write(b"\0\0\x08\x01" + b"\0\0\x01\x02" + bytes(258))
    assert idx.read_labels(path).shape == (258,)


def test_more_than_one_piece(write, idx_bytes, monkeypatch):
    monkeypatch.setattr(idx, "PIECE", 5)
    np.testing.assert_array_equal(idx.read(write(idx_bytes(IMAGES)), 3), IMAGES)


@pytest.mark.parametrize(
    ("content", "read", "wrong"),
    [
        (b"", idx.read_labels, "is not an IDX file"),
        (b"\0\0\x08", idx.read_labels, "is not an IDX file"),
        (b"P5 28 28 255 ....", idx.read_images, "is not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", idx.read_labels, "type 0x0d, not unsigned bytes"),
        (b"\0\0\x08\x01\0\0\0\x01\x07", idx.read_images, "holds labels, not images"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 1, 1, 1) + b"x", idx.read_labels, "holds images, not labels"),
        (b"\0\0\x08\x02" + struct.pack(">2I", 1, 1) + b"x", idx.read_images, "holds 2 dimensions, not images"),
        (b"\0\0\x08\x03" + struct.pack(">2I", 1, 1), idx.read_images, "ends within its header"),
        (b"\0\0\x08\x01\0\0\0\x03ab", idx.read_labels, "promises 3 bytes, 2 follow"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", idx.read_labels, "promises 3 bytes, more follow"),
        (b"\0\0\x08\x01\0\0\0\0", idx.read_labels, "holds no labels"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 0, 4), idx.read_images, "holds no images"),
    ],
)
def test_damage_is_named(write, content, read, wrong):
    path = write(content)
    with pytest.raises(UsageError) as caught:
        read(path)
    message = str(caught.value)
    assert wrong in message
    assert message.startswith(str(path))
    assert message.endswith("in its place")
    assert "\n" not in message


def test_a_header_that_lies_costs_no_memory(write):
    path = write(b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(100))
    assert _peak_memory(path, "100 follow") < 8 * idx.PIECE


def test_a_file_that_swells_costs_no_memory(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1, 2, 2) + bytes(64 * idx.PIECE)))
    assert _peak_memory(path, "more follow") < 8 * idx.PIECE


def _peak_memory(path, wrong: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=wrong):
            idx.read_images(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kept", [3, 12, 30, -1])
def test_truncated_gzip(tmp_path, idx_bytes, kept):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(IMAGES))[:kept])
    with pytest.raises(UsageError, match="damaged gzip file"):
        idx.read_images(path)


@pytest.mark.parametrize(("place", "wrong"), [(10, "invalid block type"), (-8, "CRC")])
def test_altered_gzip(tmp_path, idx_bytes, place, wrong):
    content = bytearray(gzip.compress(idx_bytes(IMAGES)))
    content[place] = 0xFF
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"damaged gzip file.*{wrong}"):
        idx.read_images(path)


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_opened(tmp_path, there):
    with pytest.raises(UsageError, match=r"cannot read .*: (not a regular file|No such file)"):
        idx.read_images(tmp_path if there else tmp_path / "missing")


def test_only_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(200 * 10**9)
    for name, wrong in {"pipe": "not a regular file", "sparse": f"larger than {idx.MAX_FILE_BYTES} bytes"}.items():
        with pytest.raises(UsageError, match=f"cannot read .*{name}: {wrong}; put a complete IDX file of images"):
            idx.read_images(tmp_path / name)
