"""The GIF file format, as far as needed to isolate the first frame.

See https://www.w3.org/Graphics/GIF/spec-gif89a.txt.
"""

MAGIC = b"GIF8"
"""First bytes of a GIF."""

GRAPHIC_CONTROL = 0xF9
"""Label of the extension with a frame's transparent color."""


def first_frame(content: bytes) -> bytes:
    """A GIF of the first frame only, without comments.

    Pillow 11 takes a time that grows with the square of the size of a comment, hours for the largest files.

    Raises:
        ValueError: the content has no frame, or is not made of the blocks of a GIF.
    """
    end = 13 + _color_table_bytes(content[10:11])
    kept = [content[:end]]
    while True:
        start, kind = end, content[end : end + 1]
        if kind == b"!":
            end = _after_sub_blocks(content, start + 2)
            if content[start + 1 : start + 2] == bytes([GRAPHIC_CONTROL]):
                kept.append(content[start:end])
        elif kind == b",":
            colors = _color_table_bytes(content[start + 9 : start + 10])
            end = _after_sub_blocks(content, start + 10 + colors + 1)  # 1: the size of the codes
            return b"".join([*kept, content[start:end], b";"])
        else:
            raise ValueError("no frame" if kind in (b"", b";") else f"unknown block 0x{kind.hex()}")


def _color_table_bytes(flags: bytes) -> int:
    """The size of the color table that the flags of a screen or a frame announce."""
    packed = int.from_bytes(flags)
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0


def _after_sub_blocks(content: bytes, position: int) -> int:
    """The position after a sequence of sub-blocks, which a sub-block of size 0 or the end of the content ends."""
    while size := int.from_bytes(content[position : position + 1]):
        position += 1 + size
    return position + 1
