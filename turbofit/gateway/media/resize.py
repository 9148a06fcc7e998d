"""Pictures resized by the gateway, where no parameter of a request can hold them to their share.

The one place where the gateway decodes an image, with Pillow, as LMDeploy would: to RGB, without
turning it, and with the same filter. What comes out is lossless.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.pictures import Picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.gateway.limits.request_limits import LimitedImage
    from turbofit.gateway.media.clips import Clip

#: Pictures that are decoded at a time: each may take what `pictures.LARGEST_PIXELS` do.
_AT_ONCE: Final = 2
#: A JPEG is decoded at the nearest power of two above this many times its new sides.
_DRAFT: Final = 2
#: zlib's fastest: this file only crosses the loopback.
_COMPRESSION: Final = 1


class Resizer:
    """Resizes what `prepare.Preparation` says, outside of the event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def resize(
        self, media: Sequence[Picture | Clip], limited: Sequence[LimitedImage]
    ) -> list[Picture | Clip]:
        """The same media, with the pictures that are to be resized.

        Raises:
            Refusal: a picture that cannot be decoded.
        """
        kept = list(media)
        for place, (medium, limit) in enumerate(zip(media, limited, strict=True)):
            if limit.resize is not None and isinstance(medium, Picture):
                async with self._turn:
                    kept[place] = await asyncio.to_thread(resized, medium, limit.resize)
        return kept


def resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """A picture with these sides in pixels, as a PNG.

    Raises:
        Refusal: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(b64decode(picture.base64))) as image:
            if image.format == "JPEG":
                image.draft("RGB", (size[0] * _DRAFT, size[1] * _DRAFT))
            smaller = resized_image(image, size)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - Pillow's plugins raise whatever they meet
        raise Refusal("broken_image:pixels") from None
    file = BytesIO()
    smaller.save(file, "PNG", compress_level=_COMPRESSION)
    data = file.getvalue()
    return Picture(mime="image/png", base64=b64encode(data).decode(), size=size, bytes=len(data))


def resized_image(image: Any, size: tuple[int, int]) -> Any:
    """A decoded image with these sides, in RGB."""
    from PIL import Image

    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
