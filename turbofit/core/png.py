"""Images of one colour for test requests, without an image library."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache


def png(width: int, height: int, colour: int = 0) -> bytes:
    """Make an image of one ``colour`` (0xRRGGBB), as a PNG of a few kilobytes at any size.

    ``width`` and ``height`` are in pixels. A server decodes the image faster than a photograph.
    """
    palette = _chunk(b"PLTE", struct.pack(">I", colour)[1:] * 2)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0))
    end = _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + palette + _pixels(width, height) + end


@lru_cache(maxsize=64)
def _pixels(width: int, height: int) -> bytes:
    return _chunk(b"IDAT", zlib.compress(bytes(1 + -(-width // 8)) * height, 9))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
