"""Whatever bytes a client sends for a picture or a video: refused, or of a size for the engine."""

from __future__ import annotations

import struct

from tests.hostile import hostile
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.media.clips import check_film, film_clip, film_of, frames_of
from turbofit.gateway.media.pictures import (
    LARGEST_PIXELS,
    LONGEST_SIDE,
    Picture,
    from_base64,
    from_bytes,
    from_url,
)

MOST = 1 << 20
HEADER = struct.Struct("<ifii")


def picture(data: bytes) -> Picture:
    kind, rest = data[0] % 3, data[1:]
    if kind == 0:
        return from_bytes(rest, MOST)
    if kind == 1:
        return from_base64(rest.decode("latin-1"), MOST)
    return from_url(rest.decode("utf-8", "replace"), MOST)


@hostile("images")
def test_a_picture_is_refused_or_has_a_size_for_an_engine(data: bytes) -> None:
    try:
        found = picture(data or b"\0")
    except Refusal as exc:
        refused = exc
    else:
        assert 1 <= min(found.size) <= max(found.size) <= LONGEST_SIDE
        assert found.size[0] * found.size[1] <= LARGEST_PIXELS
        assert found.inline.startswith("data:image/")
        return
    assert 400 <= refused.status < 500


@hostile("videos")
def test_a_video_is_refused_or_has_frames_for_an_engine(data: bytes) -> None:
    try:
        if data[:1] == b"\0" and len(data) > HEADER.size:
            frames, rate, width, height = HEADER.unpack_from(data, 1)
            film = check_film(data[1 + HEADER.size :], MOST)
            clip = film_clip(film, frames, rate, (width, height))
        else:
            url = data[1:].decode("utf-8", "replace")
            clip = frames_of(url, MOST) or film_clip(film_of(url, MOST), 9, 30.0, (64, 48))
            assert clip.frames >= 1
    except Refusal as exc:
        refused = exc
    else:
        assert min(clip.size) >= 1
        assert clip.size[0] * clip.size[1] <= LARGEST_PIXELS
        assert clip.decoded_bytes > 0
        return
    assert 400 <= refused.status < 500
