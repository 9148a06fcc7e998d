"""Pictures: what their headers say, and those that the gateway resizes."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import zlib
from base64 import b64decode, b64encode
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
from PIL import Image, ImageChops, ImageFile

from tests.support.gateway import data_url, picture
from tests.virtual_time import settled
from turbofit.core.images.rule import LARGEST_PIXELS
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media import pictures
from turbofit.gateway.media.pictures import (
    PicturePermits,
    from_base64,
    from_bytes,
    from_url,
    resized,
    resized_image,
)

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
MOST = 4 << 20


def png(width: int, height: int, *, rows: bytes = b"") -> bytes:
    """A PNG with any header, whether or not its pixels are there."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def refused(data: bytes | str, most: int = MOST) -> Refusal:
    with pytest.raises(Refusal) as caught:
        from_url(data, most) if isinstance(data, str) else from_bytes(data, most)
    assert 400 <= caught.value.status < 500
    return caught.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (37, 61), (640, 480)])
def test_size_and_type_come_from_the_content(kind, size) -> None:
    data = picture(*size, kind)
    image = from_url(data_url(data, "image/svg+xml"), MOST)
    assert image.size == size
    assert image.mime == f"image/{kind.lower()}"
    assert image.base64 == b64encode(data).decode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unknown_image_type"), (b"<!doctype html><html></html>", "unknown_image_type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "unknown_image_type"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_image_type"),
        (b"\x1f\x8b" + bytes(50), "unknown_image_type"), (b"%PDF-1.4", "unknown_image_type"),
        (b"RIFF\x10\x00\x00\x00AVI LIST", "unknown_image_type"),
        (b"BM", "broken_image"), (b"\xff\xd8\xff", "broken_image"), (b"GIF89a", "broken_image"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "broken_image"), (b"\x89PNG\r\n\x1a\n", "broken_image"),
        (png(1, 100_000), "bad_image_size"), (png(0, 5), "broken_image"),
        (png(65_000, 65_000), "too_many_pixels"), (png(60_000, 1600), "too_many_pixels"),
    ],
)  # fmt: skip
def test_what_is_no_usable_image_is_refused_from_its_header(data, reason) -> None:
    refusal = refused(data)
    assert refusal.reason == reason
    assert reason != "too_many_pixels" or str(LARGEST_PIXELS) in refusal.message


def test_the_largest_webp_takes_no_more_host_memory_than_other_images(monkeypatch) -> None:
    """What one image may take is reserved for each that a request may have."""
    reasons = {}
    for kind in ("WEBP", "JPEG"):
        header = (kind, (10_000, 7_000), pictures._PixelsAt(0, ()))
        monkeypatch.setattr(pictures, "_header", lambda _, header=header: header)
        reasons[kind] = refused(b"").reason
    assert reasons == {"WEBP": "too_many_pixels", "JPEG": "truncated_image"}


def frames(kind: str, file: Path) -> bytes:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.read_bytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "MPO"])
def test_of_several_pictures_in_a_file_the_first_is_taken(kind: str, tmp_path) -> None:
    """Animations, and what phones put behind a photograph; LMDeploy's engine takes it so, too."""
    found = from_bytes(frames(kind, tmp_path / kind), MOST)
    assert (found.mime, found.size) == (pictures._MIMES[kind], (8, 8))
    smaller = pictures.resized(found, (4, 4))
    with Image.open(BytesIO(b64decode(smaller.base64))) as image:
        red, green, blue = image.getpixel((1, 1))
    assert red > 200 > 50 > max(green, blue)


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def with_segments(*segments: bytes, size: tuple[int, int] = (8, 8)) -> bytes:
    """A JPEG with more segments before its own."""
    whole = picture(*size, "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def test_the_end_of_a_thumbnail_is_not_that_of_its_photograph(tmp_path) -> None:
    thumbnail = segment(0xE1, b"Exif\0\0" + picture(16, 16, "JPEG"))
    photograph = with_segments(thumbnail, size=(300, 300))
    assert from_bytes(photograph, MOST).size == (300, 300)
    # What follows the end is no matter: phones put films there.
    assert from_bytes(photograph + b"\xff\xda" * 9, MOST).size == (300, 300)
    for cut in (2, 200, 900):
        assert refused(photograph[:-cut]).reason == "truncated_image"
    several = frames("MPO", tmp_path / "several")
    cut_short = several[:2] + thumbnail + several[2 : several.index(b"\xff\xd9")]
    assert refused(cut_short).reason == "truncated_image"


@pytest.mark.parametrize("kind", ["GIF", "BMP"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_gif_and_a_bmp_that_are_cut_short(kind: str, mode: str) -> None:
    """LMDeploy would paint the missing pixels grey, and answer."""
    file = BytesIO()
    Image.effect_noise((61, 40), 90).convert(mode).save(file, kind)
    whole = file.getvalue()
    assert from_bytes(whole, MOST).size == (61, 40)
    for cut in (2, 50, len(whole) // 3):
        assert refused(whole[:-cut]).reason == "truncated_image"


def test_runs_of_a_bmp_have_an_end() -> None:
    head = struct.pack(
        "<2sIHHIIiiHHIIiiII", b"BM", 0, 0, 0, 1078, 40, 4, 1, 1, 8, 1, 0, 0, 0, 256, 0
    )
    runs = head + bytes(1024) + b"\4\7\0\0"
    assert refused(runs).reason == "truncated_image"
    assert from_bytes(runs + b"\0\1", MOST).size == (4, 1)


def test_a_gif_of_tiny_parts_is_not_followed_for_ever() -> None:
    whole = picture(300, 300, "GIF")
    for count, taken in ((10_000, True), (100_000, False)):
        with nullcontext() if taken else pytest.raises(Refusal, match="truncated"):
            from_bytes(whole[:-2] + b"\1\0" * count + whole[-2:], MOST)


def test_segments_of_a_jpeg_are_read_as_pillow_reads_them() -> None:
    odd = (b"\xff\xff\xff", segment(0xFE, b"\xff\xda\xff\xd9"), b"junk", b"\xff\x00", b"\xff\xf3")
    exif = segment(0xE1, b"Exif\0\0" + bytes(60_000))
    for segments in (odd, (exif,) * 16):
        assert from_bytes(with_segments(*segments), MOST).size == (8, 8)
    # Pillow joins it once for each: quadratic, on the event loop.
    assert refused(with_segments(*(exif,) * 17)).reason == "broken_image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_files_of_very_many_parts_are_refused(kind) -> None:
    whole = picture(8, 8, kind)
    start, part = {
        "PNG": (33, struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))),
        "JPEG": (2, segment(0xFE, b"")),
        "GIF": (whole.find(b","), b"!\x01\x01\0\0"),
    }[kind]
    assert from_bytes(whole[:start] + part * 1000 + whole[start:], MOST).size == (8, 8)
    assert refused(whole[:start] + part * 100_000 + whole[start:]).reason == "broken_image"


@pytest.mark.parametrize(("kind", "most"), [("PNG", 8), ("JPEG", 10.1), ("GIF", 8), ("WEBP", 16)])
def test_host_memory_is_no_less_than_pillow_takes(kind, most) -> None:
    """Bytes of a pixel, of a decoded file of 9 megapixels."""
    assert from_bytes(picture(64, 48, kind), MOST).decoded_bytes >= 64 * 48 * most


def test_a_file_that_two_parsers_read_differently_is_refused() -> None:
    """Pillow asks its Photo CD reader before its WebP reader, and that looks at byte 2048."""
    data = bytearray(picture(64, 64, "WEBP"))
    data += bytes(4096 - len(data))
    data[2048:2052] = b"PCD_"
    data[4:8] = struct.pack("<I", len(data) - 8)
    assert refused(bytes(data)).reason == "unknown_image_type"


@pytest.mark.parametrize(
    "url",
    [
        "", "data:,", "data:image/png,QQ==", "data:image/png;base64", "file:///etc/x",
        "/etc/passwd", "ftp://a/b", "data:image/png;base64,", "data:image/png;base64,####",
        "data:image/png;base64,QQ==;base64,QQ==", "DATA:image/png;charset=x;base64,Q",
    ],
)  # fmt: skip
def test_other_urls_and_junk_are_refused(url) -> None:
    assert refused(url).status in (400, 415)


def test_base64_that_is_oddly_spelled_is_mended() -> None:
    data = picture(33, 21)
    text = b64encode(data).decode()
    loose = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)).rstrip("=")
    assert from_base64(loose, MOST).base64 == text
    for mime in ("image/png", "image/jpeg", "image/png;charset=x", ""):
        assert from_url(data_url(data, mime), MOST).inline == data_url(data)


def test_bytes_are_counted_before_decoding() -> None:
    refusal = refused("data:image/png;base64," + "A" * (9 << 20))
    assert refusal.status == 413
    assert str(MOST) in refusal.message
    assert refused(b"\x89PNG" + bytes(MOST)).status == 413


@pytest.mark.parametrize("tag", [45056, 45057, 300])
def test_what_a_file_makes_pillow_say_goes_nowhere(tag, recwarn) -> None:
    """Python keeps each text that was shown, and stderr is a log: strangers filled both."""
    pictures._drop_warnings.cache_clear()
    entry = struct.pack("<HHII", tag, 4, 9, 5000)
    index = b"MPF\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    with contextlib.suppress(Refusal):
        from_bytes(with_segments(segment(0xE2, index)), MOST)
    assert [str(warning.message) for warning in recwarn] == []


def gradient(mode: str = "RGB") -> Image.Image:
    return Image.linear_gradient("L").resize((300, 200)).convert(mode)


def stored(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("L", "PNG"), ("RGB", "JPEG")]
)
def test_a_picture_is_resized_without_loss(mode, kind) -> None:
    data = stored(gradient(mode), kind)
    small = resized(from_bytes(data, MOST), (112, 56))
    png = Image.open(BytesIO(b64decode(small.base64)))
    assert (png.format, png.mode, png.size, small.size) == ("PNG", "RGB", (112, 56), (112, 56))
    assert small.mime == "image/png"
    difference = ImageChops.difference(png, resized_image(Image.open(BytesIO(data)), (112, 56)))
    # A JPEG is decoded at a smaller scale: about the same.
    assert max(high for _, high in difference.getextrema()) < (12 if kind == "JPEG" else 1)


def test_what_cannot_be_decoded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # LMDeploy sets it for its whole process; the gateway's is another one.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    picture = from_bytes(stored(gradient(), "PNG"), MOST)
    data = bytearray(b64decode(picture.base64))
    data[60:90] = bytes(30)
    broken = msgspec.structs.replace(picture, base64=b64encode(data).decode())
    with pytest.raises(Refusal, match="cannot be decoded"):
        resized(broken, (28, 28))


SMALL, PHOTO, LARGEST = (1000, 1000), (4000, 3000), (LARGEST_PIXELS // 9000, 9000)


@pytest.mark.parametrize(
    ("threads", "size", "at_once"),
    [(0, SMALL, 2), (1, PHOTO, 2), (15, SMALL, 15), (15, PHOTO, 7), (15, LARGEST, 1)],
)
async def test_as_many_at_once_as_threads_and_memory_allow(threads, size, at_once) -> None:
    permits, begun = PicturePermits(threads), list[int]()
    ends = [asyncio.Event() for _ in range(20)]

    async def resize(number: int) -> None:
        async with permits.of(size):
            begun.append(number)
            await ends[number].wait()

    resizing = asyncio.gather(*map(resize, range(20)))
    await settled()
    assert begun == list(range(at_once))
    ends[0].set()
    await settled()
    assert len(begun) == at_once + 1
    for end in ends:
        end.set()
    await resizing
