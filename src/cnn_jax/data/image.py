"""Reading an image file of any size and kind as an array of a given shape."""

import contextlib
import functools
import io
import math
import os
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from cnn_jax import files
from cnn_jax.data import background, gif
from cnn_jax.data.memory import MemoryBudget
from cnn_jax.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

Fit = Literal["pad", "crop", "stretch"]
"""How an image of another aspect ratio is brought to a size."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Pillow's names of the formats that are decoded; its other decoders are never tried, except that of pillow-heif."""

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Bytes 8 to 11 of a HEIC file (ISO/IEC 23008-12)."""

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF, in either byte order, with offsets of 32 or 64 bits."""

MAX_FILE_BYTES = 1 << 28
"""Maximum size of an image file in bytes, enough for any that is compressed."""

MAX_PIXELS = 1 << 26
"""Maximum number of pixels of an image, below Pillow's own limits. Decoding that many takes 0.5 to 1.3 GB."""

MAX_SIDE = (1 << 16) - 1
"""Maximum height and width in pixels, JPEG's own. The memory for resizing grows with the side, not with the area."""

BYTES_PER_PIXEL = 20
"""Largest memory observed for decoding, in bytes per pixel, of a WebP with transparency; a PNG takes 8 to 12."""

BLOCK_BYTES = 1 << 26
"""Size of the blocks in which Pillow allocates images: glibc returns blocks above 32 MiB to the system when freed."""

READING = MemoryBudget(MAX_FILE_BYTES)
"""Memory for the content of the files that are read at the same time."""

DECODING = MemoryBudget(MAX_PIXELS * BYTES_PER_PIXEL)
"""Memory for the images that are decoded at the same time, 1.3 GB: a tiny file can hold the largest image."""

GRAY_MODES = ("1", "L", "LA", "I;16")
"""Pillow's modes without color, among those that it has for these formats."""

ORIENTATION = 0x0112
"""EXIF tag (CIPA DC-008) of the rotation and reflection to apply before showing an image."""


def read_image(
    source: Path | IO[bytes], size: tuple[int, int] | None, channels: int | None, fit: Fit = "pad"
) -> np.ndarray:
    """Decode an image and resize it.

    The EXIF orientation is applied, transparency is composited on white, 16 bits are reduced to the upper 8, and the
    first frame of an animation is used. The image is resized with an antialiasing filter; an image that already has
    the size keeps its pixels unchanged. Use ``quiet`` to suppress Pillow's warnings.

    Args:
        source: a PNG, JPEG, WebP, BMP or GIF file, or a HEIC file if pillow-heif is installed, recognized by its
            content; or such a file opened for reading bytes.
        size: height and width, or None to keep the image's own.
        channels: 1 for gray, 3 for red, green and blue, or None to keep color files in color and gray ones in gray.
        fit: ``"pad"`` resizes the image to fit inside the size and centers it on its own background color, the median
            of its border; ``"crop"`` resizes it to cover the size and keeps the center; ``"stretch"`` changes its
            aspect ratio.

    Returns:
        uint8 ``[H, W, channels]``.

    Raises:
        UsageError: the file cannot be read, is damaged, is not such an image, or is too large.
    """
    # The traceback of an error refers to the images, whose memory is released with the error. A new one is raised.
    with contextlib.ExitStack() as memory:
        try:
            pixels = _decoded(source, size, channels, fit, memory)
            return _padded(pixels, size) if size else pixels
        except UsageError as error:
            message = str(error)
    raise UsageError(message)


def _decoded(
    source: Path | IO[bytes],
    size: tuple[int, int] | None,
    channels: int | None,
    fit: Fit,
    memory: contextlib.ExitStack,
) -> np.ndarray:
    """The image at a size, or inside it if ``fit`` is ``"pad"``."""
    from PIL import Image

    Image.core.set_block_size(BLOCK_BYTES)
    with _opened_image(source) as image:
        channels = channels or (1 if image.mode in GRAY_MODES else 3)
        coefficients = _coefficient_bytes(image)
        if size:  # a JPEG of several times the size is decoded at 1/2, 1/4 or 1/8 of its own, which is much faster
            image.draft(None, (2 * max(size),) * 2)
        num_pixels = math.prod(image.size) + math.prod(size or image.size)
        memory.enter_context(DECODING.reserve(coefficients + BYTES_PER_PIXEL * num_pixels))
        # Before the orientation, for which Pillow decodes some files and hides errors.
        image.load()
        orientation = _orientation(image)
        transposed = orientation > 4
        opaque = _on_white(image).convert("L" if channels == 1 else "RGB")
        if size:
            opaque = _resized(opaque, size if transposed else size[::-1], fit)
        pixels = np.asarray(opaque).reshape(opaque.height, opaque.width, channels)
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    # 1 and 5: unchanged; 2 and 6: columns reversed; 3 and 7: both; 4 and 8: rows reversed.
    vertical, horizontal = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return pixels[::vertical, ::horizontal].copy()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings about damaged EXIF data and the like.

    To be used around all the threads that read images, not in each: warning filters belong to the whole process.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BytesIO]:
    """The content of an image file, in memory, with the path as its name.

    Raises:
        UsageError: it cannot be read, is not a regular file, or is larger than ``MAX_FILE_BYTES``.
    """
    with contextlib.ExitStack() as memory:
        try:
            with files.open_data(path, MAX_FILE_BYTES) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                memory.enter_context(READING.reserve(num_bytes))
                content = io.BytesIO(file.read(num_bytes))  # no more, as a file in /proc can be endless
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except ValueError:  # Python has no OSError for this
            raise UsageError(f"cannot read {path}: its name contains a null byte") from None
        content.name = path
        yield content


@contextlib.contextmanager
def _opened_image(source: Path | IO[bytes]) -> Iterator["Image.Image"]:
    """An image whose header has been read; any error while it is open becomes a ``UsageError``."""
    from PIL import Image, UnidentifiedImageError

    name = source if isinstance(source, Path) else getattr(source, "name", "the image")
    limits = f"the limits are {MAX_PIXELS} pixels, and {MAX_SIDE} in height or width"
    with opened(source) if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        start = file.read(12)
        file.seek(0)
        try:
            if start.startswith(gif.MAGIC):
                file = io.BytesIO(gif.first_frame(file.read()))
            with Image.open(file, formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                    raise UsageError(f"{name} is too large, {width}x{height} pixels: {limits}")
                yield image
        except (UsageError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise UsageError(f"{name} {_problem(start)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise UsageError(f"{name} is too large: {limits}") from None
        except Exception as error:  # decoders raise errors of their own and Python's
            reason = textwrap.shorten(str(error), 100) or type(error).__name__
            raise UsageError(f"{name} cannot be decoded: {reason}") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """``FORMATS``, and HEIC if the package that decodes it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def _problem(start: bytes) -> str:
    """Why a file that starts with these 12 bytes is not decoded, and what to do."""
    if start.startswith(TIFF_MAGIC):  # Pillow before 13 lets a small TIFF take any amount of memory
        return "is a TIFF, which is not supported: convert it to PNG"
    if start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS:
        if "HEIF" in _formats():
            return "is a damaged HEIC image"
        return "is a HEIC image, which needs pillow-heif: pip install -e '.[heic]', or convert it to JPEG"
    return "is not a PNG, JPEG, WebP, BMP or GIF image"


def _resized(image: "Image.Image", size: tuple[int, int], fit: Fit) -> "Image.Image":
    """The image resized to cover a width and height, to fit inside them, or to have them in any case."""
    from PIL import Image, ImageOps

    if fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
    if fit == "pad":  # Pillow's ImageOps.contain would round the side of a narrow image to 0
        width, height = image.width / image.height * size[1], image.height / image.width * size[0]
        size = (min(size[0], max(1, round(width))), min(size[1], max(1, round(height))))
    return image.resize(size, Image.Resampling.BICUBIC)


def _padded(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image ``[h, w, C]`` in the center of one of a height and width, on its own background color."""
    height, width, channels = pixels.shape
    if (height, width) == size:
        return pixels
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    padded = np.empty((*size, channels), np.uint8)
    padded[:] = background.color(pixels)
    padded[top : top + height, left : left + width] = pixels
    return padded


def _coefficient_bytes(image: "Image.Image") -> int:
    """The most memory a JPEG takes besides its pixels: a progressive one keeps all coefficients, at full size."""
    return 2 * math.prod(image.size) * len(image.getbands()) if image.format in ("JPEG", "MPO") else 0


def _orientation(image: "Image.Image") -> int:
    """The EXIF orientation, from 1 to 8; 1, as stored, if there is none or the EXIF data are damaged.

    Pillow's ``exif_transpose`` is not used, because it also rewrites the EXIF data and fails on those of some cameras.
    """
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def _on_white(image: "Image.Image") -> "Image.Image":
    """The image without transparency, in a mode that Pillow converts faithfully to 8-bit gray and RGB."""
    from PIL import Image

    if image.mode == "I;16":  # Pillow would clip it at 255
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
