"""Bent bodies and media: nothing of ours breaks.

That nothing past the limits goes on: `test_oracle_lmdeploy`, by LMDeploy's own code.
"""

from __future__ import annotations

import asyncio
import struct

import pytest

from tests.hostile import hostile
from tests.support.gateway import PATCHES, TILES, call, gateway, plan_for
from turbofit.core.images import PatchRule, VideoRule
from turbofit.core.images.rule import LARGEST_PIXELS, LONGEST_SIDE
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import ROUTES
from turbofit.gateway.media.clips import check_film, film_clip, film_of, frames_of
from turbofit.gateway.media.pictures import (
    Picture,
    from_base64,
    from_bytes,
    from_url,
)

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


VIDEOS = PatchRule(
    patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056,
    video=VideoRule(merged_frames=2, min_pixels=100_352, max_pixels=10_035_200),
)  # fmt: skip
PLANS = [plan_for(TILES), plan_for(PATCHES, limit=602_112), plan_for(VIDEOS, limit=602_112)]
POSTS = [route.path for route in ROUTES.values() if route.method == "POST"]


@hostile("bodies")
def test_bytes_are_answered_and_hold_nothing_afterwards(data: bytes) -> None:
    """The first bytes say which plan, with or without an overlay, and which route."""
    plan, route = data[:2].ljust(2, b"\0")

    async def posted() -> None:
        app, _ = gateway(PLANS[plan // 2 % 3], overlay=plan % 2 == 0)
        reply = await call(app, POSTS[route % len(POSTS)], raw=data[2:], method="POST")
        assert reply.status < 500, reply.body
        assert all(engine.gate.counted == engine.host_bytes == 0 for engine in app.engines)
        await app.shutdown()

    asyncio.run(posted())


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
        image = picture(data or b"\0")
    except Refusal as exc:
        refused = exc
    else:
        assert 1 <= min(image.size) <= max(image.size) <= LONGEST_SIDE
        assert image.size[0] * image.size[1] <= LARGEST_PIXELS
        assert image.inline.startswith("data:image/")
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
