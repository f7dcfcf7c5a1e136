import io
import os
import struct
import sys
import traceback
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from cnn_jax.data import image
from cnn_jax.data.image import MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE, quiet, read_image
from cnn_jax.data.memory import MemoryBudget
from cnn_jax.errors import UsageError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), np.uint8)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), np.uint8)
LUMA = np.array([0.299, 0.587, 0.114])

# The stored pixels as shown, for each EXIF orientation.
SEEN = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.moveaxis(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.moveaxis(stored, 0, 1), 2),
    8: lambda stored: np.rot90(stored),
}


def encoded(image, form="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, kind, rows, before=b"", after=b""):
    """A PNG according to the specification, with features that Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def read(content, size=GRAY.shape, channels=3):
    pixels = read_image(io.BytesIO(content), size, channels)
    assert pixels.dtype == np.uint8
    if size:
        assert pixels.shape[:2] == size
    if channels:
        assert pixels.shape[2] == channels
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def on_white(values, alpha):
    alpha = alpha[..., np.newaxis] / 255
    return values * alpha + 255 * (1 - alpha)


def palette_image(colors, indices):
    image = Image.fromarray(indices)
    image.putpalette(colors.ravel().tolist())
    return image


PALETTE = RNG.integers(0, 256, (8, 3), np.uint8)
INDICES = RNG.integers(0, 8, (5, 7)).astype(np.uint8)
WIDE = RNG.integers(0, 2**16, (5, 7), np.uint16)
WIDE_COLOUR = RNG.integers(0, 2**16, (5, 7, 3), np.uint16)
RGB_OF_GRAY = np.repeat(GRAY[..., np.newaxis], 3, axis=2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(encoded(GRAY, "PNG"), RGB_OF_GRAY, id="png L"),
        pytest.param(encoded(COLOUR, "PNG"), COLOUR, id="png RGB"),
        pytest.param(encoded(GRAY > 127, "PNG"), np.where(RGB_OF_GRAY > 127, 255, 0), id="png 1"),
        pytest.param(encoded(palette_image(PALETTE, INDICES), "PNG"), PALETTE[INDICES], id="png P"),
        pytest.param(encoded(WIDE, "PNG"), np.repeat(WIDE[..., np.newaxis] // 256, 3, axis=2), id="png I;16"),
        pytest.param(
            png(7, 5, 16, 2, [row.astype(">u2").tobytes() for row in WIDE_COLOUR]), WIDE_COLOUR // 256, id="png RGB 16"
        ),
        pytest.param(encoded(GRAY, "BMP"), RGB_OF_GRAY, id="bmp L"),
        pytest.param(encoded(COLOUR, "BMP"), COLOUR, id="bmp RGB"),
        pytest.param(encoded(GRAY > 127, "BMP"), np.where(RGB_OF_GRAY > 127, 255, 0), id="bmp 1"),
        pytest.param(encoded(palette_image(PALETTE, INDICES), "BMP"), PALETTE[INDICES], id="bmp P"),
        pytest.param(encoded(COLOUR, "WEBP", lossless=True), COLOUR, id="webp RGB"),
    ],
)
def test_lossless_formats(content, expected):
    np.testing.assert_array_equal(read(content), expected)
    np.testing.assert_allclose(read(content, channels=1)[..., 0], expected @ LUMA, atol=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(encoded(np.dstack([COLOUR, ALPHA]), "PNG"), on_white(COLOUR, ALPHA), id="png RGBA"),
        pytest.param(encoded(np.dstack([GRAY, ALPHA]), "PNG"), on_white(RGB_OF_GRAY, ALPHA), id="png LA"),
        pytest.param(
            encoded(np.dstack([COLOUR, ALPHA]), "WEBP", lossless=True, exact=True),
            on_white(COLOUR, ALPHA),
            id="webp RGBA",
        ),
        pytest.param(
            encoded(palette_image(PALETTE, INDICES), "PNG", transparency=3),
            on_white(PALETTE[INDICES], np.where(INDICES == 3, 0, 255)),
            id="png P with one color transparent",
        ),
        pytest.param(
            encoded(palette_image(PALETTE, INDICES), "PNG", transparency=bytes(range(0, 160, 20))),
            on_white(PALETTE[INDICES], INDICES * 20),
            id="png P with an alpha for each color",
        ),
        pytest.param(
            encoded(INDICES, "PNG", transparency=3),
            on_white(INDICES[..., np.newaxis].repeat(3, 2), np.where(INDICES == 3, 0, 255)),
            id="png L with one gray transparent",
        ),
        pytest.param(
            encoded(COLOUR, "PNG", transparency=tuple(COLOUR[2, 3].tolist())),
            on_white(COLOUR, np.where((COLOUR[2, 3] == COLOUR).all(axis=-1), 0, 255)),
            id="png RGB with one color transparent",
        ),
        pytest.param(
            png(
                7,
                5,
                16,
                0,
                [row.astype(">u2").tobytes() for row in WIDE],
                before=chunk(b"tRNS", struct.pack(">H", WIDE[1, 2])),
            ),
            on_white(np.repeat(WIDE[..., np.newaxis] // 256, 3, axis=2), np.where(WIDE[1, 2] == WIDE, 0, 255)),
            id="png I;16 with one gray transparent",
        ),
    ],
)
def test_transparency_is_composited_on_white(content, expected):
    np.testing.assert_allclose(read(content), expected, atol=1)
    np.testing.assert_allclose(read(content, channels=1)[..., 0], expected @ LUMA, atol=1.5)


SMOOTH = np.linspace([0, 60, 250], [255, 180, 10], 64).astype(np.uint8).reshape(8, 8, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(SMOOTH[..., 1]), SMOOTH[..., 1, np.newaxis].repeat(3, 2)),
        (Image.fromarray(SMOOTH), SMOOTH),
        # Amounts of ink on white paper; the last one is black.
        (Image.merge("CMYK", [*Image.fromarray(255 - SMOOTH).split(), Image.new("L", (8, 8), 0)]), SMOOTH),
    ],
    ids=["L", "RGB", "CMYK"],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(image, expected, progressive):
    content = encoded(image, "JPEG", quality=100, subsampling=0, progressive=progressive)
    np.testing.assert_allclose(read(content, (8, 8)), expected, atol=4)
    np.testing.assert_allclose(read(content, (8, 8), channels=1)[..., 0], expected @ LUMA, atol=4)


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(form, orientation):
    stored = SMOOTH[:6]
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    content = encoded(stored, form, exif=exif(orientation), **options)
    expected = SEEN[orientation](stored)
    np.testing.assert_array_equal(read(content, size=None), read(content, expected.shape[:2]))
    np.testing.assert_allclose(read(content, expected.shape[:2]), expected, atol=4 if form == "JPEG" else 0)
    # The requested height and width apply after the rotation.
    tall = read(content, (20, 10))
    upright = read(encoded(np.ascontiguousarray(expected), form, **options), (20, 10))
    np.testing.assert_allclose(tall, upright, atol=6 if form == "JPEG" else 2)


def test_orientation_that_follows_the_pixels():
    rows = [row.tobytes() for row in GRAY]
    content = png(7, 5, 8, 0, rows, after=chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0")))
    for size in ((7, 5), None):
        np.testing.assert_array_equal(read(content, size, 1)[..., 0], np.rot90(GRAY, -1))


@pytest.mark.parametrize("damaged", [b"Exif\0\0", b"Exif\0\0nonsense", exif(6)[:14], exif(9), exif(0)])
def test_damaged_exif_is_ignored(damaged):
    content = encoded(GRAY, "PNG", exif=damaged)
    with quiet():
        for size in (GRAY.shape, None):
            np.testing.assert_array_equal(read(content, size, 1)[..., 0], GRAY)


def test_quiet():
    # The orientation, followed by a thousand fractions that are missing.
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 5, 1000, 8)
    content = encoded(GRAY, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + b"\0\0\0\0")
    with pytest.warns(UserWarning, match="corrupt EXIF data|larger than file|Truncated"):
        Image.open(io.BytesIO(content)).getexif()
    with quiet():
        np.testing.assert_array_equal(read(content, (7, 5), 1)[..., 0], np.rot90(GRAY, -1))
    with pytest.warns(UserWarning, match="not suppressed"):
        warnings.warn("not suppressed", stacklevel=1)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_antialiasing(form):
    board = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    np.testing.assert_allclose(read(encoded(board.astype(np.uint8), form, quality=100), (8, 8), 1), 127.5, atol=1)


def test_a_large_jpeg_is_the_mean_of_its_blocks():
    coarse = np.kron(SMOOTH, np.ones((16, 16, 1))).astype(np.uint8)
    content = encoded(coarse, "JPEG", quality=95, exif=exif(6))
    np.testing.assert_allclose(read(content, (8, 8)), np.rot90(SMOOTH, -1), atol=12)


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation(form):
    others = [Image.fromarray(255 - COLOUR)] * 2
    content = encoded(
        COLOUR, form, save_all=True, append_images=others, **({"lossless": True} if form == "WEBP" else {})
    )
    np.testing.assert_array_equal(read(content), COLOUR)


def test_the_first_of_several_pictures_in_a_jpeg():
    others = [Image.fromarray(255 - SMOOTH)]
    content = encoded(SMOOTH, "MPO", save_all=True, append_images=others, quality=100, subsampling=0, exif=exif(3))
    np.testing.assert_allclose(read(content, (8, 8)), np.rot90(SMOOTH, 2), atol=4)


@pytest.mark.parametrize(
    ("content", "in_color"),
    [
        *[(encoded(image, "PNG"), False) for image in (GRAY, GRAY > 127, WIDE, np.dstack([GRAY, ALPHA]))],
        *[(encoded(image, "PNG"), True) for image in (COLOUR, palette_image(PALETTE, INDICES))],
        (encoded(GRAY, "JPEG"), False),
        (encoded(COLOUR, "JPEG"), True),
        (encoded(Image.new("CMYK", (7, 5)), "JPEG"), True),
        (encoded(GRAY, "BMP"), False),
        (encoded(COLOUR, "BMP"), True),
        (encoded(COLOUR, "WEBP"), True),
        (encoded(palette_image(PALETTE, INDICES), "GIF"), True),
    ],
)
def test_own_size_and_channels(content, in_color):
    pixels = read(content, size=None, channels=None)
    assert pixels.shape == (5, 7, 3 if in_color else 1)
    np.testing.assert_array_equal(pixels, read(content, (5, 7), 3 if in_color else 1))


def test_a_file_by_its_path(tmp_path):
    (tmp_path / "picture.txt").write_bytes(encoded(COLOUR))
    np.testing.assert_array_equal(read_image(tmp_path / "picture.txt", (5, 7), 3), COLOUR)


def refusals(path):
    """The messages with each kind of arguments."""
    for size, channels in (((4, 4), 3), (None, None)):
        with pytest.raises(UsageError) as caught:
            read_image(path, size, channels)
        message = str(caught.value)
        assert message.isprintable()
        yield message


@pytest.mark.parametrize("content", [b"", b"text\n", encoded(GRAY, "PPM"), encoded(GRAY, "ICO"), b"\x89PNG\r\n\x1a\n"])
def test_no_image(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for message in refusals(tmp_path / "x.png"):
        assert message == f"{tmp_path / 'x.png'} is not a PNG, JPEG, WebP, BMP or GIF image"


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"big_tiff": True}])
def test_tiff(tmp_path, options):
    (tmp_path / "x.tif").write_bytes(encoded(GRAY, "TIFF", **options))
    for message in refusals(tmp_path / "x.tif"):
        assert message == f"{tmp_path / 'x.tif'} is a TIFF, which is not supported: convert it to PNG"


@pytest.fixture
def formats_anew():
    """The formats are determined again in this test, and after it."""
    image._formats.cache_clear()
    yield
    image._formats.cache_clear()


@pytest.mark.parametrize("brand", image.HEIC_BRANDS)
def test_heic_without_its_package(tmp_path, monkeypatch, formats_anew, brand):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "x.heic").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + b"heic")
    for message in refusals(tmp_path / "x.heic"):
        assert message == (
            f"{tmp_path / 'x.heic'} is a HEIC image, which needs pillow-heif: pip install -e '.[heic]', or convert it "
            "to JPEG"
        )


def test_heic(tmp_path, formats_anew):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    picture = np.kron(SMOOTH[:6], np.ones((16, 16, 1), np.uint8))
    for name, options in {"x": {}, "turned": {"exif": exif(6)}}.items():
        (tmp_path / name).write_bytes(content := encoded(picture, "HEIF", quality=100, **options))
        expected = np.rot90(picture, -1) if options else picture
        np.testing.assert_allclose(read_image(tmp_path / name, None, None), expected, atol=12)
    (tmp_path / "x").write_bytes(content[: len(content) // 2])
    for message in refusals(tmp_path / "x"):
        assert message == f"{tmp_path / 'x'} is a damaged HEIC image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(tmp_path, form, share):
    noise = RNG.integers(0, 256, (50, 60, 3), np.uint8)
    content = encoded(noise, form)
    (tmp_path / "x").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UsageError, match=f"^{tmp_path / 'x'} cannot be decoded: [^\n]+$"):
        read_image(tmp_path / "x", (50, 60), 3)


def bmp(width, height):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


def jpeg(width, height):
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\0"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"


def webp(width, height):
    """An animation with a header of this size, but tiny frames."""
    content = bytearray(encoded(COLOUR, "WEBP", save_all=True, append_images=[Image.fromarray(255 - COLOUR)]))
    content[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        png(65535, 65535, 8, 2, []),
        png(2**31 - 1, 2**31 - 1, 8, 2, []),
        png(MAX_SIDE + 1, 1, 8, 0, [bytes(MAX_SIDE + 1)]),
        png(1, MAX_SIDE + 1, 8, 0, []),
        png(10_000, 10_000, 8, 2, []),
        png(10_000, MAX_PIXELS // 10_000 + 1, 8, 2, []),
        bmp(65535, 65535),
        bmp(2**31 - 1, -(2**31)),
        jpeg(65500, 65500),
        webp(65535, 65535),
        webp(10_000, 10_000),
    ],
)
def test_too_large(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with quiet():
        for message in refusals(tmp_path / "x"):
            assert message.startswith(f"{tmp_path / 'x'} is too large")
            assert message.endswith("the limits are 67108864 pixels, and 65535 in height or width")


def test_just_not_too_large():
    with pytest.raises(UsageError, match="cannot be decoded"):
        read(png(8192, 8192, 8, 2, []))
    assert read(png(MAX_SIDE, 1, 8, 0, [bytes(MAX_SIDE)]), (2, 2)).max() == 0


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.write(encoded(GRAY))
        file.truncate(200 * 10**9)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, wrong in {
        "missing": "cannot read {}: No such file or directory",
        "loop": "cannot read {}: Too many levels of symbolic links",
        "pipe": "cannot read {}: not a regular file",
        "device": "cannot read {}: not a regular file",
        "sparse": f"cannot read {{}}: larger than {MAX_FILE_BYTES} bytes",
        ".": "cannot read {}: not a regular file",
    }.items():
        for message in refusals(tmp_path / name):
            assert message == wrong.format(tmp_path / name)


def test_control_sequences_in_names(tmp_path):
    path = tmp_path / "a\n\x1b[31m\udcff.png"
    path.write_bytes(b"text")
    for message in refusals(path):
        assert message == rf"{tmp_path}/a\n\x1b[31m\udcff.png is not a PNG, JPEG, WebP, BMP or GIF image"


@pytest.mark.parametrize(
    ("content", "reserved"),
    [
        (encoded(np.zeros((300, 400), np.uint8), "PNG"), 300 * 400 * image.BYTES_PER_PIXEL),
        (encoded(np.zeros((300, 400, 3), np.uint8), "WEBP"), 300 * 400 * image.BYTES_PER_PIXEL),
        # Decoded at an eighth of its size, but the coefficients of a progressive JPEG have its full size.
        (
            encoded(np.zeros((320, 400, 3), np.uint8), "JPEG", progressive=True),
            40 * 50 * image.BYTES_PER_PIXEL + 320 * 400 * 3 * 2,
        ),
    ],
)
def test_memory_is_reserved_for_decoding(monkeypatch, content, reserved):
    monkeypatch.setattr(image, "DECODING", budget := MemoryBudget(10**9))
    read(content, (8, 8))
    assert budget.peak == reserved + 8 * 8 * image.BYTES_PER_PIXEL


def test_concurrent_decoding_stays_within_the_budget(monkeypatch, tmp_path):
    (tmp_path / "x.webp").write_bytes(encoded(Image.new("RGB", (500, 400)), "WEBP", method=0))
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", (500, 400))))
    total = 5 * 500 * 400 * image.BYTES_PER_PIXEL // 2
    monkeypatch.setattr(image, "DECODING", budget := MemoryBudget(total))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: read_image(tmp_path / name, (8, 8), 3), ["x.webp", "x.png"] * 20))
        assert total // 3 < budget.peak <= total


def test_an_error_does_not_keep_the_image_alive():
    content = encoded(RNG.integers(0, 256, (50, 60, 3), np.uint8))
    with pytest.raises(UsageError, match="cannot be decoded") as caught:
        read_image(io.BytesIO(content[:-100]), (8, 8), 3)
    assert caught.value.__context__ is None
    frames = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    assert not [value for frame in frames[1:] for value in frame.f_locals.values() if isinstance(value, Image.Image)]


def test_memory_is_reserved_for_the_content_of_a_file_while_it_is_used(monkeypatch, tmp_path):
    content = encoded(COLOUR)
    (tmp_path / "x").write_bytes(content)
    monkeypatch.setattr(image, "READING", budget := MemoryBudget(10**9))
    with image.opened(tmp_path / "x") as first, image.opened(tmp_path / "x") as second:
        assert first.getvalue() == second.getvalue() == content
        np.testing.assert_array_equal(read_image(first, (5, 7), 3), COLOUR)
    np.testing.assert_array_equal(read_image(tmp_path / "x", (5, 7), 3), COLOUR)
    assert budget.peak == 2 * len(content)


def test_non_ascii_names(tmp_path):
    path = tmp_path / "Größe 大.png"
    path.write_bytes(b"text")
    for message in refusals(path):
        assert message.startswith(f"{path} is not a PNG")


def test_an_open_file_without_a_name():
    with pytest.raises(UsageError, match="the image is not a PNG, JPEG"):
        read_image(io.BytesIO(b"text"), (4, 4), 1)


GENUINE = {
    form: encoded(np.dstack([SMOOTH, SMOOTH[..., 0]]) if form != "JPEG" else SMOOTH, form, **options)
    for form, options in {
        "PNG": {"exif": exif(6)},
        "JPEG": {"exif": exif(6), "progressive": True},
        "WEBP": {"exif": exif(6)},
        "BMP": {},
        "GIF": {},
    }.items()
}


def fix_checksums(content):
    """Recompute the checksums of a PNG's chunks, so that changes in them are not rejected for their checksum."""
    start = 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[start + 4 : end]))[: len(content) - end]
        start = end + 4


@pytest.mark.parametrize("form", GENUINE)
def test_arbitrary_bytes_give_an_image_or_an_error(form):
    place = st.integers(0, len(GENUINE[form]) - 1)
    outcomes, messages = set(), []

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(st.dictionaries(place, st.integers(0, 255), min_size=1, max_size=4), place | st.none())
    @example({}, None)
    @example({0: 0}, None)
    def mutate(changes, end):
        content = bytearray(GENUINE[form])
        for index, value in changes.items():
            content[index] = value
        if form == "PNG":
            fix_checksums(content)
        try:
            with quiet():
                read(bytes(content[:end]), (6, 5), 3)
        except UsageError as error:
            messages.append(str(error))
            outcomes.add("refused")
        else:
            outcomes.add("read")

    mutate()
    assert outcomes == {"read", "refused"}
    assert all(map(str.isprintable, messages))
