"""Bodies of every route, from bytes to what an engine is given.

The first byte chooses the plan, the second the route, the rest is the body.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from msgspec.structs import replace

from bench.common.gateway import PATCHES, TILES, picture, plan_for
from bench.common.judge import check_body
from bench.common.mutations import KNOBS, PATHS, Mutator
from bench.fuzz.check import expect
from turbofit.core.images import PatchRule, VideoRule
from turbofit.gateway.http.bodies import read_body
from turbofit.gateway.http.prepare import Media, finish, hold, remote_urls, start
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.http.routes import ROUTES
from turbofit.gateway.limits.request_limits import bounds_of, model_default
from turbofit.gateway.media.clips import check_film, film_clip, film_of, frames_of
from turbofit.gateway.media.pictures import Picture
from turbofit.gateway.media.resize import resized

WORDS: Final = (
    *KNOBS, '"messages":[{"role":"user","content":', '{"type":"text","text":"', '"image_url"',
    '"video_url"', '"url":"data:image/png;base64,', '"data:video/jpeg;base64,', '"image_data":',
    '"prompt":', '"input":', '"n":', '"stop":', '"logit_bias":{', '"response_format":{"type":',
    '"json_schema"', '"tools":[', '"tool_choice":', '"max_tokens":', '"mm_processor_kwargs":{',
    '"media_io_kwargs":{"video":{', '"num_frames":', '"fps":', '"source":{"type":"base64","data":',
    '"tool_result"', '"refusal"', "1e308", "-1", "null", "true", "[]", "{}", "\\ud800", "\\u0000",
    "https://example.com/a.png",
)  # fmt: skip
_VIDEOS: Final = PatchRule(
    patch_size=14, merge=2, min_pixels=3136, max_pixels=12_845_056,
    video=VideoRule(merged_frames=2, min_pixels=100_352, max_pixels=10_035_200),
)  # fmt: skip
_RULES: Final = (TILES, PATCHES, _VIDEOS)
_LIMITS: Final = ({"limit": 12}, {"limit": 602_112}, {"limit": 602_112})
_BOUNDS: Final = tuple(
    bounds_of(plan_for(rule, **limits), overlay=overlay)
    for rule, limits in zip(_RULES, _LIMITS, strict=True)
    for overlay in (True, False)
)
_ROUTES: Final = tuple(route for route in ROUTES.values() if route.method == "POST")
_MOST_PIXELS: Final = 4_000_000
_REMOTE: Final = picture(30, 20)


def one(data: bytes) -> None:
    """A body is refused (`Refusal`), or what is passed on is within the plan's limits."""
    if len(data) < 2:
        return
    bounds, route = _BOUNDS[data[0] % len(_BOUNDS)], _ROUTES[data[1] % len(_ROUTES)]
    with suppress(Refusal):
        read_body(route.kind, None)
    try:
        parsed = start(bounds, route.kind, data[2:])
        fetched = dict.fromkeys(remote_urls(parsed), _REMOTE)
        most, clip = bounds.limits.bytes_per_image, None
        for slot in parsed.slots:
            if slot.shape == "clip":
                clip = frames_of(slot.source, most) or _film(slot.source, most)
        found = _resized(hold(bounds, route.kind, parsed, fetched, clip))
        body, prepared = finish(bounds, route.kind, parsed, found)
    except Refusal as refusal:
        expect(400 <= refusal.status < 500, refusal)
        return
    assert prepared.units <= bounds.limits.units_per_request * max(1, prepared.copies)
    if clip is None and route.path in PATHS:
        rule = _RULES[data[0] % len(_BOUNDS) // 2]
        check_body(rule, bounds.limits, model_default(bounds), route.path, body)


def _resized(found: Media) -> Media:
    """The media as `Resizer` makes them, which does it in threads.

    Raises:
        Refusal: a picture cannot be decoded, or would take long to.
    """
    media = list(found.media)
    for place, one in enumerate(found.limited):
        picture = media[place]
        if one.resize is not None and isinstance(picture, Picture):
            if picture.size[0] * picture.size[1] > _MOST_PIXELS:
                raise Refusal(400, "left_out", "it takes a thread's time, not the loop's")
            media[place] = resized(picture, one.resize)
    return replace(found, media=tuple(media))


def _film(url: str, most: int):
    """A film whose header another process would read."""
    return film_clip(check_film(film_of(url, most), most), 90, 30.0, (640, 360))


def seeds() -> list[bytes]:
    """Bent requests to each plan and route."""
    found, paths = [], [route.path for route in _ROUTES]
    mutator = Mutator(23, large=False)
    while len(found) < 240:
        path, raw = mutator.request()
        if len(raw) < 1200:
            found.append(bytes((len(found) % len(_BOUNDS), paths.index(path))) + raw)
    frames = b'"data:video/jpeg;base64,/9j/2Q==,/9j/2Q=="'
    for video in (b'{"type":"video_url","video_url":{"url":%s}}' % frames,):
        body = b'{"messages":[{"role":"user","content":[%s]}],"n":1}' % video
        found += [bytes((plan, paths.index("/v1/chat/completions"))) + body for plan in (4, 5)]
    return found
