"""Videos as clients send them: a URL of frames or of a film, and what a film's header says.

The first byte chooses between a URL and a header; a header is four numbers and the file.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from typing import Final

from bench.common.gateway import picture
from bench.fuzz.check import expect
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.clips import check_film, film_clip, film_of, frames_of
from turbofit.gateway.media.pictures import LARGEST_PIXELS

WORDS: Final = (
    "data:video/jpeg;base64,", "data:video/mp4;base64,", ";base64,", ",/9j/", "ftypisom",
    "ftypqt  ", "moov",
    "\\x1aE\\xdf\\xa3", "RIFF", "AVI ", "LIST", "\\x00\\x00\\x01\\xba", "#EXTM3U", "concat:",
)  # fmt: skip
_MOST: Final = 1 << 20
_HEADER: Final = struct.Struct("<ifii")


def one(data: bytes) -> None:
    """A video is refused (`Refusal`), or has frames of a size that an engine may be given."""
    try:
        if data[:1] == b"\0" and len(data) > _HEADER.size:
            frames, rate, width, height = _HEADER.unpack_from(data, 1)
            film = check_film(data[1 + _HEADER.size :], _MOST)
            clip = film_clip(film, frames, rate, (width, height))
        else:
            url = data[1:].decode("utf-8", "replace")
            found = frames_of(url, _MOST)
            clip = found or film_clip(film_of(url, _MOST), 9, 30.0, (64, 48))
            assert clip.frames >= 1
    except Refusal as refusal:
        expect(400 <= refusal.status < 500, refusal)
        return
    assert min(clip.size) >= 1
    assert clip.size[0] * clip.size[1] <= LARGEST_PIXELS
    assert clip.decoded_bytes > 0


def seeds() -> list[bytes]:
    """Frames, and the first bytes of each kind of film."""
    frame = b64encode(picture(4, 4, "JPEG"))
    found = [b"\1data:video/jpeg;base64," + b",".join([frame] * count) for count in (1, 2)]
    heads = (
        b"\0\0\0\x18ftypisom",
        b"\0\0\0\x14ftypqt  ",
        b"\x1aE\xdf\xa3",
        b"RIFF\0\0\0\0AVI LIST",
    )
    for head in heads:
        found.append(b"\1data:video/mp4;base64," + b64encode(head + bytes(8)))
        found.append(b"\0" + _HEADER.pack(30, 25.0, 640, 480) + head)
    return found
