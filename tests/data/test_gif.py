import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageSequence

from cnn_jax.data import gif
from cnn_jax.data.image import read_image
from cnn_jax.errors import UsageError

RNG = np.random.default_rng(0)
GRAY = RNG.permutation(256).astype(np.uint8).reshape(16, 16)
COLOURS = RNG.integers(0, 256, (8, 3), np.uint8)
INDICES = RNG.integers(0, 8, (5, 7), np.uint8)


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "GIF", **options)
    return buffer.getvalue()


def palette_image(indices=INDICES):
    image = Image.fromarray(indices)
    image.putpalette(COLOURS.ravel().tolist())
    return image


def read(content, channels=None):
    return read_image(io.BytesIO(content), None, channels)


def sub_blocks(content):
    parts = [content[start : start + 255] for start in range(0, len(content), 255)]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def minimal(before=b"", flags=0x80):
    """A GIF of one pixel, written by hand according to the specification: the second color of two, (4, 5, 6)."""
    screen = struct.pack("<HHBBB", 1, 1, flags, 0, 0) + bytes([1, 2, 3, 4, 5, 6])
    # Codes of 3 bits: clear (4), the color (1), end (5).
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02" + sub_blocks(bytes([0b01_001_100, 0b1]))
    return b"GIF89a" + screen + before + frame + b";"


def test_a_file_written_by_hand():
    assert read(minimal()).tolist() == [[[4, 5, 6]]]


def test_gray_and_color():
    gray = read(encoded(Image.fromarray(GRAY)))
    assert gray.shape == (16, 16, 1)
    np.testing.assert_array_equal(gray[..., 0], GRAY)
    for interlace in (0, 1):
        np.testing.assert_array_equal(read(encoded(palette_image(), interlace=interlace)), COLOURS[INDICES])


def test_transparency_is_composited_on_white():
    expected = np.where((INDICES == 3)[..., np.newaxis], 255, COLOURS[INDICES])
    np.testing.assert_array_equal(read(encoded(palette_image(), transparency=3), 3), expected)


def test_the_first_frame_of_an_animation():
    others = [palette_image((INDICES + step) % 8) for step in range(1, 5)]
    content = encoded(palette_image(), save_all=True, append_images=others, duration=20, loop=0, comment=b"x" * 1000)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 5
    np.testing.assert_array_equal(read(content, 3), COLOURS[INDICES])
    first = gif.first_frame(content)
    assert len(first) < len(content) / 3
    with Image.open(io.BytesIO(first)) as image:
        assert image.n_frames == 1
        assert "comment" not in image.info


def test_a_single_frame_is_kept_as_it_is():
    content = encoded(palette_image(), transparency=3)
    assert gif.first_frame(content) == content


def test_a_long_comment_takes_no_time():
    # Pillow 11 copies all of it for each of the 20,000 sub-blocks, which takes 6 seconds.
    comment = b"!\xfe" + sub_blocks(bytes(20_000 * 255))
    assert gif.first_frame(minimal(comment)) == minimal()
    assert read(minimal(comment)).tolist() == [[[4, 5, 6]]]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"GIF89a", "no frame"),
        (minimal()[:19] + b";", "no frame"),
        (minimal(b"x"), "unknown block 0x78"),
        (minimal(b"!\xfe\xff"), "no frame"),
        (minimal()[:-5], "."),
    ],
)
def test_damaged(content, wrong):
    with pytest.raises(UsageError, match=f"^the image cannot be decoded: {wrong}"):
        read(content)


def test_too_large():
    content = bytearray(minimal())
    content[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(UsageError, match=r"^the image is too large"):
        read(bytes(content))


def test_a_frame_larger_than_its_screen():
    content = bytearray(minimal())
    content[24:28] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(UsageError, match=r"^the image is too large"):
        read(bytes(content))
