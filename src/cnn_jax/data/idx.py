"""The IDX file format, in which MNIST and its relatives are published."""

import math
import struct
from pathlib import Path

import numpy as np

from cnn_jax.errors import UsageError

UINT8 = 0x08
"""Type code of unsigned bytes."""

CONTENTS = {1: "labels", 3: "images"}
"""What a file contains, by its number of dimensions."""


def images(content: bytes, path: Path) -> np.ndarray:
    """The images in the content of a file: uint8 ``[N, H, W, 1]``. See ``decode``."""
    return decode(content, path, 3)[..., np.newaxis]


def labels(content: bytes, path: Path) -> np.ndarray:
    """The labels in the content of a file: int32 ``[N]``. See ``decode``."""
    return decode(content, path, 1).astype(np.int32)


def decode(content: bytes, path: Path, num_dimensions: int) -> np.ndarray:
    """Decode the content of an IDX file of unsigned bytes.

    It starts with two zero bytes, the code of the element type, the number of dimensions, and the size of each
    dimension as a big-endian 32-bit integer. The elements follow in row-major order. Source: "The IDX file format",
    Y. LeCun, C. Cortes and C. Burges, http://yann.lecun.com/exdb/mnist/.

    Args:
        content: the content of the file, not compressed.
        path: the file, for error messages.
        num_dimensions: the expected number, 1 for labels and 3 for images.

    Returns:
        uint8, with the shape in the header; a copy.

    Raises:
        UsageError: the file is damaged or contains something else.
    """
    remedy = f"replace it with a complete IDX file of {CONTENTS[num_dimensions]}"
    if problem := _mismatch(content[:4], num_dimensions):
        raise UsageError(f"{path} {problem}; {remedy}")
    start = 4 + 4 * num_dimensions
    if len(content) < start:
        raise UsageError(f"{path} ends within its header; {remedy}")
    shape = struct.unpack(f">{num_dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise UsageError(
            f"{path} is damaged: its header announces {math.prod(shape)} bytes, but {len(content) - start} follow; "
            f"{remedy}"
        )
    if not math.prod(shape):
        raise UsageError(f"{path} contains no {CONTENTS[num_dimensions]}; {remedy}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _mismatch(magic: bytes, num_dimensions: int) -> str | None:
    """What is wrong with a file that starts with these four bytes, if anything."""
    if len(magic) < 4 or magic[:2] != b"\0\0":
        return "is not an IDX file"
    if magic[2] != UINT8:
        return f"contains elements of type 0x{magic[2]:02x}, not unsigned bytes"
    if magic[3] != num_dimensions:
        found = CONTENTS.get(magic[3], f"{magic[3]} dimensions")
        return f"contains {found}, not {CONTENTS[num_dimensions]}"
    return None
