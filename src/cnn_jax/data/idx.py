"""The IDX file format, in which MNIST and its relatives are published."""

import contextlib
import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cnn_jax import files
from cnn_jax.errors import UsageError

UINT8 = 0x08
CONTENTS = {1: "labels", 3: "images"}
PIECE = 1 << 20
LARGEST = 1 << 27
"""Bytes of elements that are read at most; MNIST's training images and those of its relatives are 47 million."""

MAX_FILE_BYTES = LARGEST + (1 << 10)
"""Of a file, whose header is short and which gzip does not make larger."""


def read_images(path: Path) -> np.ndarray:
    """Images: uint8 ``[N, H, W, 1]``. Raises as ``read`` does."""
    return read(path, 3)[..., np.newaxis]


def read_labels(path: Path) -> np.ndarray:
    """Labels: int32 ``[N]``. Raises as ``read`` does."""
    return read(path, 1).astype(np.int32)


def read(path: Path, dimensions: int) -> np.ndarray:
    """Decode an IDX file of unsigned bytes, plain or gzip'd (told by its first bytes, not by its name).

    The file opens with two zero bytes, the element type's code, the number of dimensions, and that many
    big-endian 32-bit sizes; the elements follow, the last dimension running fastest. Source: "The IDX file
    format", Y. LeCun, C. Cortes and C. Burges, http://yann.lecun.com/exdb/mnist/.

    Args:
        path: the file.
        dimensions: how many are expected, 1 for labels and 3 for images.

    Returns:
        uint8, of the shape the header gives.

    Raises:
        UsageError: the file cannot be read, is damaged, or holds something else than expected.
    """
    remedy = f"put a complete IDX file of {CONTENTS[dimensions]} in its place"
    try:
        with (
            files.open_data(path, MAX_FILE_BYTES) as file,
            gzip.open(file) if is_gzip(file) else contextlib.nullcontext(file) as stream,
        ):
            if problem := _mismatch(stream.read(4), dimensions):
                raise UsageError(f"{path} {problem}; {remedy}")
            sizes = stream.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise UsageError(f"{path} ends within its header; {remedy}")
            shape = struct.unpack(f">{dimensions}I", sizes)
            promised = math.prod(shape)
            most = promised if promised <= LARGEST else PIECE  # of what is refused, only so much as shows a plain lie
            # Piece by piece, so that a header that promises too much costs no more memory than the bytes that
            # are there; and one byte beyond the promise, which also makes gzip check its sum.
            content = bytearray()
            while piece := stream.read(min(PIECE, most + 1 - len(content))):
                content += piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is a damaged gzip file ({error}); {remedy}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    if len(content) != promised:
        found = "more follow" if len(content) > most else f"{len(content)} follow"
        if promised > LARGEST and len(content) > most:
            found = f"and no more than {LARGEST} are read"
        raise UsageError(f"{path} is damaged: its header promises {promised} bytes, {found}; {remedy}")
    if not promised:
        raise UsageError(f"{path} holds no {CONTENTS[dimensions]}; {remedy}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def is_gzip(file: BinaryIO) -> bool:
    """Whether a file's first bytes are gzip's (RFC 1952); leaves it at its start."""
    file.seek(0)
    magic = file.read(2)
    file.seek(0)
    return magic == b"\x1f\x8b"


def _mismatch(magic: bytes, dimensions: int) -> str | None:
    """What is wrong with a file that opens with these four bytes, if anything."""
    if len(magic) < 4 or magic[:2] != b"\0\0":
        return "is not an IDX file"
    if magic[2] != UINT8:
        return f"holds elements of type 0x{magic[2]:02x}, not unsigned bytes"
    if magic[3] != dimensions:
        found = CONTENTS.get(magic[3], f"{magic[3]} dimensions")
        return f"holds {found}, not {CONTENTS[dimensions]}"
    return None
