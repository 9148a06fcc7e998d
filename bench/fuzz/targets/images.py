"""Headers of images: a file, its base64, or a URL, by the first byte."""

from __future__ import annotations

from base64 import b64encode
from typing import Final

from bench.common.gateway import data_url, picture
from bench.fuzz.check import expect
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.pictures import (
    LARGEST_PIXELS,
    LONGEST_SIDE,
    from_base64,
    from_bytes,
    from_url,
)

WORDS: Final = (
    "\\x89PNG\\x0d\\x0a\\x1a\\x0a", "IHDR", "IDAT", "IEND", "acTL", "fcTL", "iCCP", "tEXt",
    "zTXt", "eXIf",
    "\\xff\\xd8\\xff", "\\xff\\xe0", "\\xff\\xe1", "\\xff\\xe2MPF\\x00", "\\xff\\xc0",
    "\\xff\\xc2", "\\xff\\xda",
    "\\xff\\xd9", "Exif\\x00\\x00", "II*\\x00", "MM\\x00*", "GIF87a", "GIF89a",
    "!\\xff\\x0bNETSCAPE2.0",
    "RIFF", "WEBPVP8 ", "WEBPVP8L", "WEBPVP8X", "ANIM", "ANMF", "BM", "BA", "\\x28\\x00\\x00\\x00",
    "data:image/png;base64,", "data:", ";base64,",
)  # fmt: skip
_MOST: Final = 1 << 20


def one(data: bytes) -> None:
    """An image is refused (`Refusal`), or has a size that an engine may be given."""
    if not data:
        return
    rest = data[1:]
    try:
        if data[0] % 3 == 0:
            found = from_bytes(rest, _MOST)
        elif data[0] % 3 == 1:
            found = from_base64(rest.decode("latin-1"), _MOST)
        else:
            found = from_url(rest.decode("utf-8", "replace"), _MOST)
    except Refusal as refusal:
        expect(400 <= refusal.status < 500, refusal)
        return
    assert 1 <= min(found.size) <= max(found.size) <= LONGEST_SIDE
    assert found.size[0] * found.size[1] <= LARGEST_PIXELS
    assert found.inline.startswith("data:image/")


def seeds() -> list[bytes]:
    """A small image of each type, in each spelling."""
    files = [picture(5, 3, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    files += [_mpo(), _animated("GIF"), _animated("WEBP"), _animated("PNG")]
    found = [b"\0" + one for one in files]
    found += [b"\1" + b64encode(one) for one in files[:5]]
    return [*found, *(b"\2" + data_url(one).encode() for one in files[:2])]


def _frames():
    from PIL import Image

    return [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]


def _animated(kind: str) -> bytes:
    from io import BytesIO

    file, frames = BytesIO(), _frames()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _mpo() -> bytes:
    return _animated("MPO")
