"""Reads the type and size of clients' images from their headers, mostly without decoding.

The gateway decodes and resizes only images that no parameter of a request can limit. It resizes as
LMDeploy does: with Pillow's bicubic filter, in RGB, without turning the image; the result is
lossless. `PicturePermits` limits how many images are decoded at once. An unusable image raises a
`Refusal`.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cache
from io import BytesIO
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.images.rule import LARGEST_PIXELS, LONGEST_SIDE
from turbofit.core.struct import Struct
from turbofit.gateway.http.refusals import Refusal

#: How many pictures of `LARGEST_PIXELS` may have pixels in memory at once, 2 GiB in all.
_LARGEST_AT_ONCE: Final = 2

_MIMES: Final = {
    "PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp",
    "GIF": "image/gif", "BMP": "image/bmp",
}  # fmt: skip
_BEGINS: Final = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"), (b"BM", "BMP"), (b"RIFF", "WEBP"),
)  # fmt: skip
#: The size of a file, as computed from the length of its base64, may exceed the limit by this
#: number of bytes, since base64 may have white space.
SPACES: Final = 48 << 10
_TAKEN: Final = "PNG, JPEG, WebP, GIF and BMP are taken"
#: The most bytes of host memory for a pixel. Measured while Pillow decodes and converts: 8 for JPEG
#: and PNG, 10 for a progressive JPEG, and 2 more with four colours.
BYTES_OF_PIXEL: Final = 12
#: The most bytes of host memory for a pixel of a WebP: libwebp has two canvases and a copy. So a
#: WebP may have fewer pixels than other images.
_WEBP_BYTES_OF_PIXEL: Final = 16
#: The number of times that Pillow may read from a file until it has the header. Each 64 bytes of
#: the file allow one read more; a GIF needs one read for each 128 bytes.
_PARTS: Final = 1 << 14
#: The most segments of Exif in a JPEG. For each segment Pillow copies all earlier segments: 300
#: segments of 64 KB take 0.4 s, and 16 take 1 ms.
_EXIF_SEGMENTS: Final = 16
#: The bytes at the end of a file, by its type.
_ENDS: Final = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
#: The end of a BMP whose rows are coded as runs.
_END_OF_RUNS: Final = b"\0\1"
#: A JPEG is decoded at a reduced size, of at least this many times the new width and height.
_DRAFT: Final = 2
#: zlib's fastest level, since the file only crosses the loopback.
_COMPRESSION: Final = 1


class Picture(Struct):
    """One image: its type, read from its content; its data in base64; and its size in pixels.

    ``url`` is the client's own ``data:`` URL if LMDeploy can read this URL unchanged.
    """

    mime: str
    base64: str
    size: tuple[int, int]
    url: str | None = None

    @property
    def inline(self) -> str:
        return self.url or f"data:{self.mime};base64,{self.base64}"

    @property
    def payload(self) -> int:
        """The length of the image's base64 text in characters."""
        return len(self.base64)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of host memory of the image when an engine has decoded it to RGB."""
        return self.size[0] * self.size[1] * _bytes_of_pixel(self.mime)


def from_url(url: str, most_bytes: int) -> Picture:
    """Return the image in a ``data:`` URL.

    Raises:
        Refusal: the text is no ``data:`` URL with a usable image.
    """
    head, comma, payload = url.partition(",")
    if not comma or not head[:5].lower() == "data:":
        raise Refusal("bad_image_url")
    if not head.lower().endswith(";base64"):
        raise Refusal("bad_image_url:data")
    picture = from_base64(payload, most_bytes)
    if head == f"data:{picture.mime};base64" and picture.base64 is payload:
        # The client's own URL is passed on: to make an equal URL would copy megabytes.
        return replace(picture, url=url)
    return picture


def from_base64(text: str, most_bytes: int) -> Picture:
    """Return the image in a base64 text; white space and missing padding are accepted.

    Raises:
        Refusal: the text is no base64, too long, or no image of an accepted type.
    """
    check_bytes("image_too_big", len(text) * 3 // 4, most_bytes, SPACES)
    with suppress(ValueError):
        return from_bytes(decoded(text), most_bytes, text)
    plain = "".join(text.split()).rstrip("=")
    plain += "=" * (-len(plain) % 4)
    try:
        return from_bytes(decoded(plain), most_bytes, plain)
    except ValueError:
        raise Refusal("bad_image_base64") from None


def from_bytes(data: bytes, most_bytes: int, text: str | None = None) -> Picture:
    """Return the image in ``data``; ``text`` is the base64 of ``data`` if the caller has this text.

    Raises:
        Refusal: the image is too large, cut short, or of no accepted type.
    """
    check_bytes("image_too_big", len(data), most_bytes)
    kind, size, pixels_at = _header(data)
    width, height = size
    if width < 1 or height < 1 or max(size) > LONGEST_SIDE:
        raise Refusal("bad_image_size:sides", width=width, height=height, longest=LONGEST_SIDE)
    most = LARGEST_PIXELS * BYTES_OF_PIXEL // _bytes_of_pixel(_MIMES[kind])
    if width * height > most:
        raise Refusal(
            "too_many_pixels", width=width, height=height, pixels=width * height, most=most
        )
    if not _whole(kind, data, pixels_at):
        raise Refusal("truncated_image")
    return Picture(
        mime=_MIMES[kind],
        base64=encoded(data) if text is None else text,
        size=size,
    )


class _PixelsAt(NamedTuple):
    """Where an image's pixels are in its file: where Pillow's last read ended, and Pillow's tile.

    A tile has the decoder's name, the box of pixels, the first byte, and the decoder's arguments.
    """

    read_to: int
    tile: Sequence[Any]


def _header(data: bytes) -> tuple[str, tuple[int, int], _PixelsAt]:
    """Return an image's type, its size in pixels, and where its pixels are.

    The size of an animation is the size of its first frame.

    Pillow reads the file only if its first bytes show an accepted type. Then Pillow tries all its
    types, as in LMDeploy. A file is refused if Pillow reads another type than the first bytes show.
    """
    from PIL import Image

    guess = next((kind for begin, kind in _BEGINS if data.startswith(begin)), None)
    if guess is None or (guess == "WEBP" and data[8:12] != b"WEBP"):
        raise Refusal("unknown_image_type", taken=_TAKEN)
    _drop_warnings()
    file = _File(data)
    try:
        with Image.open(file) as image:
            kind, size = str(image.format), (int(image.width), int(image.height))
            tiles = getattr(image, "tile", ())  # a WebP has none
    except Image.DecompressionBombError:
        raise Refusal("too_many_pixels:header", most=LARGEST_PIXELS) from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's plugins raise any exception
        raise Refusal("broken_image:header") from None
    if kind not in _MIMES or (kind != guess and (kind, guess) != ("MPO", "JPEG")):
        raise Refusal("unknown_image_type", taken=_TAKEN)
    if not tiles and kind != "WEBP":
        raise Refusal("broken_image:header")
    return kind, size, _PixelsAt(file.read_to, tiles[0] if tiles else ())


class _File(BytesIO):
    """A file in memory that raises an OSError after too many reads, or too many segments of Exif.

    Without these limits, Pillow could split a stranger's file into millions of empty parts, or copy
    its Exif for hours. Pillow reads a segment of Exif at once.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left, self._exif_segments = _PARTS + len(data) // 64, 0
        #: Where the last read ended; for an MPO, Pillow then seeks to the beginning of the file.
        self.read_to = 0

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        self._left, self.read_to = self._left - 1, self.tell()
        self._exif_segments += part.startswith(b"Exif\0\0")
        if self._left < 0 or self._exif_segments > _EXIF_SEGMENTS:
            raise OSError("a file of too many parts")
        return part


@cache
def _drop_warnings() -> None:
    """Drop Pillow's warnings; where a cause matters, this module raises a `Refusal`.

    Python remembers the text of each warning for ever, and strangers' files can cause any number of
    texts.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _whole(kind: str, data: bytes, pixels: _PixelsAt) -> bool:
    """Return whether a file is complete; LMDeploy would silently paint missing pixels grey.

    The end is looked for after the header, since a thumbnail in the header has an end of its own.
    """
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data) + 1
    if kind == "GIF":
        return _whole_blocks(data, pixels.tile[2])
    if kind == "BMP":
        decoder, box, first, arguments = pixels.tile
        if decoder == "raw":  # each row has the same number of bytes
            return int(first + box[3] * arguments[1]) <= len(data)
        return data.rfind(_END_OF_RUNS, first) >= 0
    # `rfind` begins at the end of the file; a search from the beginning takes 4 ms for 3 MB.
    return data.rfind(_ENDS[kind], pixels.read_to) >= 0


def _whole_blocks(data: bytes, place: int) -> bool:
    """Return whether the blocks of a GIF's first frame, which begin at ``place``, have an end.

    Each block begins with its length, and the last block is empty. A file of too many blocks counts
    as cut short: blocks have 255 bytes, and those of a stranger may have one.
    """
    for _ in range(_PARTS + len(data) // 64):
        if place >= len(data):
            return False
        if data[place] == 0:
            return True
        place += data[place] + 1
    return False


def _bytes_of_pixel(mime: str) -> int:
    return _WEBP_BYTES_OF_PIXEL if mime == "image/webp" else BYTES_OF_PIXEL


def check_bytes(key: str, size: int, most: int, beyond: int = 0) -> None:
    """Refuse a file of more than ``most`` bytes; ``size`` may be ``beyond`` bytes too high.

    Raises:
        Refusal: the file is larger; ``key`` names the row of the refusal.
    """
    if size > most + beyond:
        raise Refusal(key, size=size, most=most)


def decoded(text: str) -> bytes:
    """Return the bytes of a base64 text.

    Raises:
        ValueError: the text is no base64.
    """
    from pybase64 import b64decode

    return b64decode(text, validate=True)


def encoded(data: bytes) -> str:
    """Return bytes in base64; pybase64 is four times as fast as Python's own module."""
    from pybase64 import b64encode_as_string

    return b64encode_as_string(data)


def resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """Return the picture resized to ``size`` in pixels, as a PNG.

    Raises:
        Refusal: the picture's pixels cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(decoded(picture.base64))) as image:
            if image.format == "JPEG":
                image.draft("RGB", (size[0] * _DRAFT, size[1] * _DRAFT))
            smaller = resized_image(image, size)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's plugins raise any exception
        raise Refusal("broken_image:pixels") from None
    file = BytesIO()
    smaller.save(file, "PNG", compress_level=_COMPRESSION)
    data = file.getvalue()
    return Picture(mime="image/png", base64=encoded(data), size=size)


def resized_image(image: Any, size: tuple[int, int]) -> Any:
    """Return a Pillow image resized to ``size`` (width, height) in pixels, in RGB."""
    from PIL import Image

    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb.resize(size, Image.Resampling.BICUBIC)


class PicturePermits:
    """Limits how many pictures are decoded at once, by their number and by their pixels.

    At most ``threads`` pictures (at least two) are decoded at once. Together they have at most the
    pixels of two pictures of the largest size. Pictures are decoded in order of arrival, so small
    pictures cannot delay a large picture for ever.
    """

    def __init__(self, threads: int) -> None:
        self._parts = max(_LARGEST_AT_ONCE, threads)
        self._pixels = -(-_LARGEST_AT_ONCE * LARGEST_PIXELS // self._parts)
        self._free = asyncio.Semaphore(self._parts)
        self._next = asyncio.Lock()

    @asynccontextmanager
    async def of(self, size: tuple[int, int]) -> AsyncIterator[None]:
        """Wait until a picture of this size may be decoded; the permit ends with the context."""
        taken = 0
        try:
            async with self._next:
                while taken < self._share(size):
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()

    def _share(self, size: tuple[int, int]) -> int:
        """Return how many of the equal parts of the allowed pixels a picture takes."""
        return min(self._parts, max(1, -(-size[0] * size[1] // self._pixels)))
