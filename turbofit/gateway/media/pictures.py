"""Images as clients send them: what they are and how large, from their headers. Never decoded."""

from __future__ import annotations

import binascii
import warnings
from base64 import b64encode
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.struct import Struct
from turbofit.gateway.http.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BYTES_OF_PIXEL",
    "LARGEST_PIXELS",
    "LONGEST_SIDE",
    "Picture",
    "decoded",
    "from_base64",
    "from_bytes",
    "from_url",
]  # fmt: skip

#: Pixels of one image, about 256 MiB once decoded. It is Pillow's own threshold for a warning.
LARGEST_PIXELS: Final = 89_478_485
#: What JPEG can hold; longer sides exist only to break things.
LONGEST_SIDE: Final = 65_535

_MIMES: Final = {
    "PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp",
    "GIF": "image/gif", "BMP": "image/bmp",
}  # fmt: skip
_TAKEN: Final = "PNG, JPEG, WebP, GIF (not animated) and BMP are taken"
#: Up to four while it is decoded, and three of the RGB that stays.
BYTES_OF_PIXEL: Final = 7


class Picture(Struct):
    """One image: its type by content, its base64, its size in pixels and in bytes.

    ``url`` is the client's own ``data:`` URL where that is spelled as LMDeploy reads it.
    """

    mime: str
    base64: str
    size: tuple[int, int]
    bytes: int
    url: str | None = None

    @property
    def inline(self) -> str:
        """The image as a ``data:`` URL."""
        return self.url or f"data:{self.mime};base64,{self.base64}"

    @property
    def payload(self) -> int:
        """Characters of its base64."""
        return len(self.base64)

    @property
    def decoded_bytes(self) -> int:
        """Host memory once an engine has decoded it to RGB."""
        return self.size[0] * self.size[1] * BYTES_OF_PIXEL


def from_url(url: str, most_bytes: int) -> Picture:
    """The image of a ``data:`` URL.

    Args:
        url: as the client wrote it.
        most_bytes: how many bytes the image may have.

    Raises:
        Refusal: another kind of URL, or no usable image.
    """
    head, comma, payload = url.partition(",")
    if not comma or not head[:5].lower() == "data:":
        raise Refusal(
            400,
            "bad_image_url",
            "an image is neither an http(s) URL nor a data: URL with base64; files of the server "
            "(file://, a path) are never read, send them inline: data:image/png;base64,...",
        )
    if not head.lower().endswith(";base64"):
        raise Refusal(400, "bad_image_url", "an image's data: URL is not base64")
    found = from_base64(payload, most_bytes)
    if head == f"data:{found.mime};base64" and found.base64 is payload:
        # Megabytes that need not be put together again.
        return replace(found, url=url)
    return found


def from_base64(text: str, most_bytes: int) -> Picture:
    """The image in base64, white space and missing padding forgiven.

    Raises:
        Refusal: junk, or no usable image.
    """
    if len(text) > most_bytes * 4 // 3 + (1 << 16):
        raise _too_big(len(text) * 3 // 4, most_bytes)
    try:
        return from_bytes(decoded(text), most_bytes, text)
    except (ValueError, binascii.Error):
        pass
    plain = "".join(text.split()).rstrip("=")
    try:
        plain += "=" * (-len(plain) % 4)
        return from_bytes(decoded(plain), most_bytes, plain)
    except (ValueError, binascii.Error):
        raise Refusal(400, "bad_image_base64", "an image's base64 is not valid") from None


def from_bytes(data: bytes, most_bytes: int, text: str | None = None) -> Picture:
    """The image in these bytes.

    Args:
        data: the file.
        most_bytes: how many bytes it may have.
        text: its base64, where it is already there.

    Raises:
        Refusal: too large, not one of the types taken, animated, truncated or without pixels.
    """
    if len(data) > most_bytes:
        raise _too_big(len(data), most_bytes)
    kind, size, frames = _header(data)
    width, height = size
    if frames > 1 and kind != "MPO":
        raise Refusal(400, "animated_image", f"an image is animated; {_TAKEN}")
    if width < 1 or height < 1 or max(size) > LONGEST_SIDE:
        raise Refusal(
            400,
            "bad_image_size",
            f"an image of {width}x{height}: sides must be between 1 and {LONGEST_SIDE}",
        )
    if width * height > LARGEST_PIXELS:
        raise Refusal(
            400,
            "too_many_pixels",
            f"an image of {width}x{height} has {width * height} pixels, the limit is "
            f"{LARGEST_PIXELS}",
        )
    if not _whole(kind, data):
        raise Refusal(400, "truncated_image", "an image is truncated")
    return Picture(
        mime=_MIMES[kind],
        base64=b64encode(data).decode() if text is None else text,
        size=size,
        bytes=len(data),
    )


def _header(data: bytes) -> tuple[str, tuple[int, int], int]:
    """Type, size and frames.

    The first bytes decide whether Pillow looks at all; then it looks as LMDeploy's will, among all
    its types, so that a file which two parsers read differently is found out.
    """
    from PIL import Image

    guess = _guess(data)
    if guess is None:
        raise Refusal(415, "unknown_image_type", f"an image is of no known type; {_TAKEN}")
    try:
        with _quiet(), Image.open(BytesIO(data)) as image:
            kind, size = str(image.format), (int(image.width), int(image.height))
            frames = int(getattr(image, "n_frames", 1)) if kind != "GIF" else _gif_frames(image)
    except Image.DecompressionBombError:
        raise Refusal(
            400, "too_many_pixels", f"an image has more pixels than {LARGEST_PIXELS}, the limit"
        ) from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's plugins raise whatever they meet
        raise Refusal(400, "broken_image", "an image's header cannot be read") from None
    if kind not in _MIMES or (kind != guess and (kind, guess) != ("MPO", "JPEG")):
        raise Refusal(415, "unknown_image_type", f"an image is of no known type; {_TAKEN}")
    return kind, size, frames


def _gif_frames(image: Any) -> int:
    """One or two: counting all would read the whole file."""
    return 2 if image.is_animated else 1


class _quiet:  # noqa: N801 - reads as a word
    """Pillow's warnings go nowhere: what they say of a file is an answer here or no matter.

    Python keeps each text that was shown, and a file decides what is in it.
    """

    _done = False

    def __enter__(self) -> None:
        if not _quiet._done:
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _quiet._done = True

    def __exit__(self, *_: object) -> None:
        return None


def _guess(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "BMP" if data.startswith(b"BM") else None


def _whole(kind: str, data: bytes) -> bool:
    """Whether the end is there; LMDeploy would paint what is missing grey without a word."""
    if kind == "PNG":
        return data.rfind(b"IEND") > 0
    if kind in ("JPEG", "MPO"):
        return data.rfind(b"\xff\xd9") > 0
    if kind == "GIF":
        return data.rfind(b"\x3b") > 0
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data) + 1
    return True


def _too_big(size: int, most: int) -> Refusal:
    return Refusal(413, "image_too_big", f"an image of {size} bytes, the limit is {most}")


def _decoder() -> Callable[[str], bytes]:
    """pybase64 where it is there, which LMDeploy brings: four times as fast."""
    try:
        from pybase64 import b64decode
    except ImportError:
        from base64 import b64decode as plain

        return lambda text: plain(text, validate=True)
    return lambda text: bytes(b64decode(text, validate=True))


#: Base64 to bytes; junk raises ``ValueError``.
decoded: Final = _decoder()
