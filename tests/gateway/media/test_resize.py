"""Pictures that the gateway resizes: lossless, and as LMDeploy would have decoded them."""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from io import BytesIO

import pytest
from PIL import Image, ImageChops, ImageFile

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import LimitedImage
from turbofit.gateway.media.pictures import from_bytes
from turbofit.gateway.media.resize import Resizer, resized, resized_image


def gradient(mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((300, 200)).convert(mode)


def stored(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def opened(picture) -> Image.Image:
    return Image.open(BytesIO(b64decode(picture.base64)))


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("L", "PNG")]
)
def test_a_picture_is_resized_without_loss(mode, kind) -> None:
    image = gradient(mode)
    small = resized(from_bytes(stored(image, kind), 1 << 20), (112, 56))
    png = opened(small)
    assert (png.format, png.mode, png.size, small.size) == ("PNG", "RGB", (112, 56), (112, 56))
    expected = resized_image(Image.open(BytesIO(stored(image, kind))), (112, 56))
    assert ImageChops.difference(png, expected).getbbox() is None
    assert small.mime == "image/png"


def test_a_jpeg_is_about_the_same() -> None:
    data = stored(gradient(), "JPEG")
    shown = opened(resized(from_bytes(data, 1 << 20), (30, 20)))
    expected = resized_image(Image.open(BytesIO(data)), (30, 20))
    assert max(high for _, high in ImageChops.difference(shown, expected).getextrema()) < 12


def test_what_cannot_be_decoded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # LMDeploy sets it for its whole process; the gateway's is another one.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    picture = from_bytes(stored(gradient(), "PNG"), 1 << 20)
    data = bytearray(b64decode(picture.base64))
    data[60:90] = bytes(30)
    broken = type(picture)(
        mime=picture.mime, base64=b64encode(data).decode(), size=picture.size, bytes=len(data)
    )
    with pytest.raises(Refusal, match="cannot be decoded"):
        resized(broken, (28, 28))


def test_only_what_is_to_be_resized_is_touched() -> None:
    picture = from_bytes(stored(gradient(), "PNG"), 1 << 20)
    kept = LimitedImage(knobs={}, units=1, tokens=1)
    lowered = LimitedImage(knobs={}, units=1, tokens=1, resize=(28, 28))

    async def run(limits):
        return await Resizer().resize((picture, picture), limits)

    same = asyncio.run(run((kept, kept)))
    assert all(image is picture for image in same)
    first, second = asyncio.run(run((kept, lowered)))
    assert first is picture
    assert second.size == (28, 28)
