import struct
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.data import idx
from cnn_jax.errors import UsageError

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4) * 10
LABELS = np.array([9, 0, 200], np.uint8)
PATH = Path("some/file")


def test_images_get_a_channel(idx_bytes):
    images = idx.images(idx_bytes(IMAGES), PATH)
    assert images.dtype == np.uint8
    assert images.flags.writeable
    np.testing.assert_array_equal(images, IMAGES[..., np.newaxis])


def test_labels_become_int32(idx_bytes):
    labels = idx.labels(idx_bytes(LABELS), PATH)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [9, 0, 200])


def test_sizes_are_big_endian():
    assert idx.labels(b"\0\0\x08\x01" + b"\0\0\x01\x02" + bytes(258), PATH).shape == (258,)


@pytest.mark.parametrize(
    ("content", "decode", "wrong"),
    [
        (b"", idx.labels, "is not an IDX file"),
        (b"\0\0\x08", idx.labels, "is not an IDX file"),
        (b"P5 28 28 255 ....", idx.images, "is not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", idx.labels, "type 0x0d, not unsigned bytes"),
        (b"\0\0\x08\x01\0\0\0\x01\x07", idx.images, "contains labels, not images"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 1, 1, 1) + b"x", idx.labels, "contains images, not labels"),
        (b"\0\0\x08\x02" + struct.pack(">2I", 1, 1) + b"x", idx.images, "contains 2 dimensions, not images"),
        (b"\0\0\x08\x03" + struct.pack(">2I", 1, 1), idx.images, "ends within its header"),
        (b"\0\0\x08\x01\0\0\0\x03ab", idx.labels, "announces 3 bytes, but 2 follow"),
        (b"\0\0\x08\x01\0\0\0\x03abcd", idx.labels, "announces 3 bytes, but 4 follow"),
        (
            b"\0\0\x08\x03" + struct.pack(">3I", *(2**32 - 1,) * 3) + b"x",
            idx.images,
            f"announces {(2**32 - 1) ** 3} bytes, but 1 follow",
        ),
        (b"\0\0\x08\x01\0\0\0\0", idx.labels, "contains no labels"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 0, 4), idx.images, "contains no images"),
    ],
)
def test_damage_is_named(content, decode, wrong):
    with pytest.raises(UsageError) as caught:
        decode(content, PATH)
    message = str(caught.value)
    assert wrong in message
    assert message.startswith(str(PATH))
    assert "; replace it with a complete IDX file of " in message
    assert "\n" not in message
