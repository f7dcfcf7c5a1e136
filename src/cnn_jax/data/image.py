"""An image file, of whatever size and kind, as an array of the form that a network takes."""

import contextlib
import io
import math
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import numpy as np

from cnn_jax import files
from cnn_jax.data.memory import MemoryBudget
from cnn_jax.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Pillow's names of the decoders that files are given to; the other forty are never tried."""

MAX_FILE_BYTES = 1 << 28
"""Of an image file: 268 million, enough for any that is not stored without compression."""

MAX_PIXELS = 1 << 26
"""Of an image: 67 million, whose decoding takes 0.5 to 1.3 GB. Pillow's own limits are above."""

BYTES_PER_PIXEL = 20
"""That decoding was seen to take at most, of a WebP with transparency; a PNG takes 8 to 12."""

BLOCK_BYTES = 1 << 26
"""In which Pillow allocates large images: blocks of up to 32 MiB, glibc keeps for the thread that has freed them."""

READING = MemoryBudget(MAX_FILE_BYTES)
"""For the files that are open at one time: some decoders read them whole."""

DECODING = MemoryBudget(MAX_PIXELS * BYTES_PER_PIXEL)
"""For the images that are decoded at one time, 1.3 GB: a tiny file may hold the largest image."""

MAX_SIDE = (1 << 16) - 1
"""Pixels, JPEG's own limit. What resizing needs besides the image grows with the side, not with the area."""

GREY_MODES = ("1", "L", "LA", "I;16")
"""Of those that Pillow has for files of these formats."""

Result = TypeVar("Result")

ORIENTATION = 0x0112
"""EXIF's tag (CIPA DC-008) that says how the stored rows and columns are to be turned for showing."""


def read_image(
    source: Path | IO[bytes], size: tuple[int, int], channels: int, on_read: Callable[[bytes], object] | None = None
) -> np.ndarray:
    """Decode an image, as a person would see it, and bring it to a size.

    It is turned as its EXIF data say, what is transparent is laid on white, 16 bits become the upper 8, and of an
    animation the first picture is taken. Another size is reached by stretching, with a filter that keeps fine
    patterns from turning into coarse ones; an image that has the size already stays as it is, bit for bit. What Pillow
    warns of meanwhile, ``quiet`` keeps from the user.

    Args:
        source: a PNG, JPEG, WebP or BMP file, told by its content; or such a file opened for reading bytes.
        size: height and width.
        channels: 1 for grey, 3 for red, green and blue.
        on_read: is given the bytes that are decoded: another process may be changing the file.

    Returns:
        uint8 ``[H, W, channels]``.

    Raises:
        UsageError: the file cannot be read, is damaged, holds something else, or is too large.
    """
    return _with_memory(lambda memory: _decoded(source, size, channels, on_read, memory))


def image_size(source: Path | IO[bytes]) -> tuple[int, int]:
    """Height and width of an image as it is seen, hardly ever decoding it for that. Raises as ``read_image`` does."""
    return _with_memory(lambda memory: _size(source, memory))


def is_colour(source: Path | IO[bytes]) -> bool:
    """Whether a file has colours by its kind, not by its pixels; decodes nothing. Raises as ``read_image`` does."""
    with _opened_image(source) as image:
        return image.mode not in GREY_MODES


def _with_memory(function: Callable[[contextlib.ExitStack], Result]) -> Result:
    """What a function returns; the memory it reserves on the stack is given back when its images are gone.

    Those are gone when it has returned, or its error has: by its traceback it keeps them.
    """
    with contextlib.ExitStack() as memory:
        try:
            return function(memory)
        except UsageError as error:
            message = str(error)
    raise UsageError(message)


def _decoded(
    source: Path | IO[bytes],
    size: tuple[int, int],
    channels: int,
    on_read: Callable[[bytes], object] | None,
    memory: contextlib.ExitStack,
) -> np.ndarray:
    from PIL import Image

    Image.core.set_block_size(BLOCK_BYTES)
    with _opened_image(source, on_read) as image:
        coefficients = _coefficient_bytes(image)
        # A JPEG of several times the size is decoded at half, a quarter or an eighth of its own: several times faster.
        image.draft(None, (2 * max(size),) * 2)
        num_pixels = math.prod(image.size) + math.prod(size)
        memory.enter_context(DECODING.reserve(coefficients + BYTES_PER_PIXEL * num_pixels))
        # Before asking for the orientation, for which Pillow decodes some files and keeps quiet about a failure.
        image.load()
        orientation = _orientation(image)
        lying = orientation > 4
        rows, columns = reversed(size) if lying else size
        flat = _on_white(image).convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(flat.resize((columns, rows), Image.Resampling.BICUBIC))
    pixels = pixels.reshape(rows, columns, channels)
    if lying:
        pixels = pixels.swapaxes(0, 1)
    # 1 and 5: as they are; 2 and 6: left to right; 3 and 7: both; 4 and 8: upside down.
    vertical, horizontal = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return pixels[::vertical, ::horizontal].copy()


def _size(source: Path | IO[bytes], memory: contextlib.ExitStack) -> tuple[int, int]:
    with _opened_image(source) as image:
        width, height = image.size
        if width == height:
            return height, width
        if image.format == "PNG":  # whose orientation may come after the pixels, so that Pillow decodes it
            memory.enter_context(DECODING.reserve(BYTES_PER_PIXEL * width * height))
        return (width, height) if _orientation(image) > 4 else (height, width)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow from warning on standard error of damaged EXIF data and the like.

    Around all the threads that read images, not in each: what Python warns of is settled for the whole process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file of images, open for reading bytes.

    Raises:
        UsageError: it cannot be read, is not a regular file, or is larger than ``MAX_FILE_BYTES``.
    """
    try:
        with files.open_data(path, MAX_FILE_BYTES) as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # for which Python has no OSError
        raise UsageError(f"cannot read {path}: there is a zero byte in its name") from None


@contextlib.contextmanager
def _opened_image(
    source: Path | IO[bytes], on_read: Callable[[bytes], object] | None = None
) -> Iterator["Image.Image"]:
    """An image whose header has been read; and whatever goes wrong while it is open, as a ``UsageError``."""
    from PIL import Image, UnidentifiedImageError

    name = source if isinstance(source, Path) else getattr(source, "name", "the image")
    limits = f"at most {MAX_PIXELS} pixels, and {MAX_SIDE} in a row or column, are read"
    with opened(source) if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        try:
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            with READING.reserve(num_bytes), contextlib.ExitStack() as stack:
                if on_read:
                    content = file.read(num_bytes)
                    on_read(content)
                    file = io.BytesIO(content)
                image = stack.enter_context(Image.open(file, formats=FORMATS))
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                    raise UsageError(f"{name} is too large, {width}x{height} pixels: {limits}")
                yield image
        except (UsageError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise UsageError(f"{name} is not a PNG, JPEG, WebP or BMP image") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise UsageError(f"{name} is too large: {limits}") from None
        except Exception as error:  # each decoder has its own, and lets through Python's
            reason = textwrap.shorten(str(error), 100) or type(error).__name__
            raise UsageError(f"{name} cannot be decoded: {reason}") from None


def _coefficient_bytes(image: "Image.Image") -> int:
    """What a JPEG takes besides its pixels at most: coefficients of its full size, if they come in several scans."""
    return 2 * math.prod(image.size) * len(image.getbands()) if image.format in ("JPEG", "MPO") else 0


def _orientation(image: "Image.Image") -> int:
    """EXIF's, from 1 to 8.

    Pillow's ``exif_transpose`` is not used for it, because it also writes the EXIF data anew: that fails on some that
    cameras write. An image whose EXIF data are damaged is as good as one that has none.
    """
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def _on_white(image: "Image.Image") -> "Image.Image":
    """An image without transparency, in one of the modes that Pillow converts to 8-bit grey and to RGB faithfully."""
    from PIL import Image

    if image.mode == "I;16":  # which Pillow would clip at 255
        values = np.asarray(image)
        opaque = values != image.info.get("transparency", -1)
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if not opaque.all():
            image.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
