"""Several images of a request, or a video, within its units: pure, over every rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.core.images.rules import BUDGET, CANVAS, CROSS, GRIDS, PAGES, SQUARE
from tests.gateway.judge import units_reaching
from tests.gateway.media.test_clips import film, opencv, sequence
from tests.support.gateway import (
    CHAT,
    PATCHES,
    TILES,
    anthropic,
    ask,
    chat,
    data_url,
    gateway,
    image_part,
    limits_for,
    picture,
    plan_for,
    promise_for,
)
from tests.support.plans import changed, model, plausible_plan
from tests.sweep import part
from turbofit.core.images import AnyresRule, PatchRule, VideoRule
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.request_limits import (
    Bounds,
    RequestedImage,
    check_images,
    check_request,
    model_default,
    within,
)
from turbofit.gateway.limits.sharing import hold_clip, hold_frames, hold_images
from turbofit.gateway.media.clips import Clip
from turbofit.serving.plan_gateway import bounds_of

pytestmark = pytest.mark.slow

OWN_TILES = replace(TILES, client_knobs=False)
ONEVISION = AnyresRule(
    tile_size=384, tokens_per_tile=729, max_dynamic_patch=36, most_tiles=9,
    grids=tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7)),
)  # fmt: skip
FRAMES = PatchRule(
    patch_size=14, merge=2, min_pixels=6272, max_pixels=4816896, client_knobs=False, frames=2,
    enlarge=True,
)  # fmt: skip
WITHOUT_KNOBS = [GRIDS, CROSS, SQUARE, FRAMES, PAGES, CANVAS]
ALL = [TILES, OWN_TILES, PATCHES, FRAMES, GRIDS, ONEVISION, CANVAS, PAGES, CROSS, SQUARE, BUDGET]
SIZES = st.tuples(st.integers(20, 4500), st.integers(20, 4500)).filter(
    lambda size: max(size) <= 190 * min(size)
)


def bounds(rule, *, images: int = 1, **changes: Any) -> Bounds:
    return Bounds(rule=rule, promise=promise_for(limits_for(rule, images=images, **changes)))


def taken_by(b: Bounds, image: RequestedImage, fit, request: dict[str, int]) -> tuple[int, int]:
    """Units and tokens that the engine will make of an image as it is passed on."""
    size = fit.resize or image.size
    if fit.knobs:
        return units_reaching(b.rule, 0, size, fit.knobs), fit.tokens
    served = b.rule.with_limit(model_default(b))
    if request:
        bound = {name: value // b.rule.frames for name, value in request.items()}
        served = replace(b.rule, **bound)
    return served.units(*size), served.tokens(*size)


@settings(max_examples=part(60, 5))
@given(
    st.lists(SIZES, min_size=1, max_size=12), st.integers(1, 3), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip
@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_images_never_take_more_than_the_request(
    rule, sizes, promised, overlay, carries, together
) -> None:
    b = replace(bounds(rule, images=promised), overlay=overlay)
    wanted = [RequestedImage(size=size, carries=carries, by_request=together) for size in sizes]
    shared = hold_images(b, wanted)
    if not within(b, shared.images) or len(sizes) > b.limits.most_images(b.rule):
        with pytest.raises(Refusal):
            check_request(b, shared.images)
        assert len(sizes) > promised
        return
    check_request(b, shared.images)
    taken = [
        taken_by(b, image, fit, shared.request)
        for image, fit in zip(wanted, shared.images, strict=True)
    ]
    assert [(fit.units, fit.tokens) for fit in shared.images] == taken
    assert sum(count for count, _ in taken) <= b.limits.units_per_request
    assert sum(tokens for _, tokens in taken) <= b.limits.image_tokens_per_request
    alone = [hold_images(b, [image]).images[0] for image in wanted]
    assert all(fit.units <= most.units for fit, most in zip(shared.images, alone, strict=True))
    if within(b, alone):
        assert [fit.units for fit in shared.images] == [fit.units for fit in alone]


@settings(max_examples=part(60, 5))
@given(st.lists(SIZES, min_size=1, max_size=5), st.booleans(), st.booleans(), st.integers(0, 99))
@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
def test_what_the_plan_alone_makes_smaller_is_said_and_nothing_else(
    rule, sizes, overlay, carries, place
) -> None:
    """Nobody asked for anything, so each change is the plan's, by an overlay or without one."""
    limits = rule.lower_limits(4)
    b = replace(bounds(rule, limit=limits[place % len(limits)], images=2), overlay=overlay)
    wanted = [RequestedImage(size=size, carries=carries, by_request=True) for size in sizes]
    for size, fit in zip(sizes, hold_images(b, wanted).images, strict=True):
        assert bool(fit.lowered) == (fit.units < rule.units(*size)), (size, fit)


@pytest.mark.parametrize("rule", WITHOUT_KNOBS, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("overlay", [True, False])
def test_what_is_asked_of_images_that_carry_nothing_is_not_sent(rule, overlay) -> None:
    asked = {"max_dynamic_patch": 99, "max_pixels": 10**9, "min_pixels": 10**9, "detail": "high"}
    # Without the overlay an image may be too large for a lower limit, and is refused.
    for limit in rule.lower_limits(2)[: None if overlay else 1]:
        b = replace(bounds(rule, limit=limit), overlay=overlay)
        (fit,) = hold_images(b, [RequestedImage(size=(1400, 900), options=asked)]).images
        assert fit.knobs == {}
        check_request(b, [fit])
        assert "max_pixels=1000000000->default" in fit.lowered


@pytest.mark.parametrize(
    ("sizes", "tiles"),
    [
        ([(448, 448), (448, 5376)], [1, 12]),  # the small one keeps its size
        ([(1792, 1344)] * 2, [5, 7]),  # 2x3 of a thumbnail; the newest has what is left over
        ([(1344, 1344)] * 4, [1, 1, 5, 5]),
        ([(4000, 4000)] * 13, [1] * 13),
        ([(448, 5376)], [13]),
    ],
)
def test_tiles_are_shared(sizes, tiles) -> None:
    shared = hold_images(bounds(TILES), [RequestedImage(size=size) for size in sizes])
    assert [fit.units for fit in shared.images] == tiles
    for size, fit in zip(sizes, shared.images, strict=True):
        lowered = fit.units < TILES.units(*size)
        assert lowered == any("max_dynamic_patch=12->" in word for word in fit.lowered)


@settings(max_examples=part(80, 5))
@given(st.lists(SIZES, min_size=2, max_size=20))
def test_pixels_are_lowered_as_little_as_is_needed(sizes) -> None:
    b = bounds(PATCHES)
    shared = hold_images(b, [RequestedImage(size=size) for size in sizes])
    fits = zip(shared.images, sizes, strict=True)
    units = [(fit.units, PATCHES.units(*size)) for fit, size in fits]
    if sum(whole for _, whole in units) <= b.limits.units_per_request:
        assert all(now == whole for now, whole in units)
        return
    # Rounding to whole windows loses a row and a column of an image at the most.
    assert sum(now for now, _ in units) > 0.9 * b.limits.units_per_request
    kept = [now for now, whole in units if now == whole]
    # The largest first: what was cut is about as large as what was kept, and not smaller.
    assert not kept or max(kept) <= max(fit.knobs["max_pixels"] for fit in shared.images) / 196
    assert len(kept) < len(units)


def test_more_images_than_units_are_refused_with_number_and_limit() -> None:
    check_images(bounds(TILES), 13)
    with pytest.raises(Refusal) as caught:
        check_images(bounds(TILES), 14)
    assert caught.value.key == "too_many_images"
    assert (caught.value.facts["count"], caught.value.facts["most"]) == (14, 13)
    kinds = (TILES, PATCHES, SQUARE, CROSS, PAGES, GRIDS)
    assert [bounds(rule).limits.most_images(rule) for rule in kinds] == [13, 64, 1, 1, 8, 2]
    for rule, images in ((PATCHES, 100), (SQUARE, 3)):
        assert bounds(rule, images=images).limits.most_images(rule) == images
    # Strips cannot be small enough.
    b = bounds(PATCHES, units_per_request=400, units_per_image=400)
    shared = hold_images(b, [RequestedImage(size=(4000, 21))] * 8)
    with pytest.raises(Refusal) as caught:
        check_request(b, shared.images)
    assert (caught.value.key, caught.value.facts["limit"]) == ("images_over_limit:request", 400)


def test_a_client_that_asks_for_less_keeps_it_and_leaves_more_to_others() -> None:
    less = RequestedImage(size=(4000, 3000), options={"max_dynamic_patch": 1})
    first, second = hold_images(bounds(TILES), [less, RequestedImage(size=(448, 5376))]).images
    assert (first.units, first.lowered) == (1, ())
    assert second.units == 12


@pytest.mark.parametrize("overlay", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
@pytest.mark.parametrize(
    ("rule", "limit", "change"),
    [
        (PATCHES, 1_003_520, "max_pixels=12845056->1003520"),
        (FRAMES, 1_003_520, "max_pixels=4816896->1003520"),
        (TILES, 4, "max_dynamic_patch=12->4"),
        (OWN_TILES, 4, "max_dynamic_patch=12->4"),
    ],
)
def test_one_image_above_the_plans_limit_is_said(path, rule, limit, change, overlay) -> None:
    records: list[Any] = []
    app, _ = gateway(plan_for(rule, limit=limit), overlay=overlay, log=records.append)
    for size, smaller in (((3840, 2160), True), ((300, 300), False)):
        body = chat(image_part(*size)) if path == CHAT else anthropic(picture(*size), model="m")
        reply = ask(app, path, body=body)
        assert reply.status == 200
        said = reply.headers.get("x-turbofit-limited", "")
        assert records.pop()["limited"] == said.split(", ") * smaller
        if not smaller or overlay:
            assert said == change * smaller
        else:  # where no field holds it, the picture itself is resized
            assert said.startswith((change, "image=3840x2160->"))


RULE = PatchRule(
    patch_size=16, merge=2, min_pixels=65_536, max_pixels=16_777_216, client_knobs=False,
    video=VideoRule(merged_frames=2, min_pixels=4096, max_pixels=25_165_824),
)  # fmt: skip
LIMIT = 1_048_576  # 4,096 patches, 1,024 tokens


def plan_of(rule=RULE, engine: str = "pytorch", limit: int = LIMIT, **changes: Any):
    plan = plausible_plan(model=model(image_rule=rule), limits=limits_for(rule, limit=limit))
    plan = changed(plan, engine=engine)
    return changed(plan, limits=replace(plan.promise.limits, **changes))


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def watching(frames: int, *parts: Any, size=(640, 480), **fields: Any) -> dict[str, Any]:
    return chat(video_part(sequence(frames, size)), *parts, **fields)


def passed(body: dict[str, Any], **changes: Any):
    app, upstream = gateway(plan_of(**changes))
    reply = ask(app, body=body)
    assert reply.status == 200, reply.json
    return upstream.bodies[0], reply


def refusal(body: dict[str, Any], **changes: Any):
    app, upstream = gateway(plan_of(**changes))
    reply = ask(app, body=body)
    assert upstream.seen == []
    return reply.status, reply.json["error"]


def test_frames_go_on_with_bounds_that_hold_them_to_one_image() -> None:
    asked = watching(9)
    body, reply = passed(asked)
    assert body["messages"][0]["content"][1] == asked["messages"][0]["content"][1]
    assert body["media_io_kwargs"] == {"video": {"num_frames": 9, "fps": 2.0}}
    bounds = body["mm_processor_kwargs"]["video"]
    assert 2000 < RULE.videos.units(9, 640, 480, **bounds) <= 4096
    # The model's own limit would have left each frame its size.
    limited = f"max_pixels={RULE.videos.rule.max_pixels}->{bounds['max_pixels']}"
    assert reply.headers["x-turbofit-limited"] == limited
    assert "x-turbofit-limited" not in passed(watching(4))[1].headers


@opencv
@pytest.mark.parametrize(
    ("parameters", "frames"),
    [
        ({}, 32), ({"num_frames": 8}, 8), ({"num_frames": 64}, 50), ({"num_frames": -1}, 50),
        ({"fps": 2}, 10), ({"num_frames": 4, "fps": 2}, 4), ({"fps": 1e-9}, 1), ({"fps": "x"}, 32),
        ({"num_frames": 10**9}, 50), ({"num_frames": True, "max_duration": 3}, 32),
    ],
)  # fmt: skip
def test_films_are_sampled_as_lmdeploy_would(tmp_path, parameters, frames) -> None:
    body = chat(
        video_part(data_url(film(tmp_path), "video/mp4")), media_io_kwargs={"video": parameters}
    )
    if frames < 2:
        status, error = refusal(body)
        assert (status, error["code"]) == (400, "bad_video")
        return
    body, _ = passed(body)
    assert body["media_io_kwargs"] == {"video": {"num_frames": frames}}


@pytest.mark.lmdeploy
@opencv
@pytest.mark.parametrize("kind", ["mp4", "avi", "jpeg"])
def test_lmdeploy_loads_as_many_frames_as_were_counted(tmp_path, kind) -> None:
    from lmdeploy.vl.media.connection import load_from_url
    from lmdeploy.vl.media.image import ImageMediaIO
    from lmdeploy.vl.media.video import VideoMediaIO

    url = sequence(7, (64, 48)) if kind == "jpeg" else data_url(film(tmp_path, kind=kind))
    body, _ = passed(chat(video_part(url), media_io_kwargs={"video": {"num_frames": 7}}))
    sent = body["messages"][0]["content"][1]["video_url"]["url"]
    keywords = body["media_io_kwargs"]["video"]
    frames, facts = load_from_url(sent, VideoMediaIO(image_io=ImageMediaIO(), **keywords))
    assert frames.shape[0] == 7 == len(facts["frames_indices"])
    assert frames.shape[1:] == ((48, 64, 3) if kind == "jpeg" else (240, 320, 3))


def test_a_video_and_images_share_the_request() -> None:
    body, _ = passed(watching(4, image_part(64, 64)))
    assert len(body["messages"][0]["content"]) == 3
    body, reply = passed(watching(32, *[image_part(4000, 3000)] * 3))
    bounds = body["mm_processor_kwargs"]
    taken = RULE.videos.units(32, 640, 480, **bounds["video"])
    taken += 3 * replace(RULE, **bounds["image"]).units(4000, 3000)
    most = plan_of().promise.limits.units_per_request
    assert 0.8 * most < taken <= most
    change = f"max_pixels={RULE.max_pixels}->{bounds['image']['max_pixels']}"
    assert change in reply.headers["x-turbofit-limited"]
    assert refusal(watching(4, video_part(sequence(4, (64, 48)))))[1]["code"] == "too_many_videos"


def test_the_place_of_a_refused_image_counts_no_video() -> None:
    url = data_url(picture(64, 64)[:-9])
    broken = {"type": "image_url", "image_url": {"url": url}}
    for parts, place in (((broken,), "an image "), ((image_part(), broken), "image 2 of 2: ")):
        _, error = refusal(watching(4, *parts))
        assert (error["code"], error["message"].startswith(place)) == ("truncated_image", True)


def test_what_is_asked_beyond_the_plan_is_lowered_and_said() -> None:
    parameters = {"video": {"max_pixels": 10**8, "min_pixels": 10**8}, "image": {"max_pixels": 1}}
    body, reply = passed(watching(4, mm_processor_kwargs=parameters))
    bounds = body["mm_processor_kwargs"]
    assert set(bounds) == {"video"}
    assert bounds["video"]["min_pixels"] < bounds["video"]["max_pixels"] < 10**8
    lowered = reply.headers["x-turbofit-limited"]
    assert "mm_processor_kwargs=image->none" in lowered
    assert f"max_pixels=100000000->{bounds['video']['max_pixels']}" in lowered
    body, reply = passed(watching(4, mm_processor_kwargs={"video": {"max_pixels": 102_400}}))
    assert body["mm_processor_kwargs"]["video"]["max_pixels"] == 102_400
    assert "x-turbofit-limited" not in reply.headers


def test_pixel_bounds_of_all_images_go_into_the_request() -> None:
    def sent(**bounds: Any):
        body = chat(image_part(4000, 4000), mm_processor_kwargs={"image": bounds})
        return passed(body, rule=FRAMES, limit=FRAMES.max_pixels)

    body, reply = sent(max_pixels=400_000, min_pixels="x", other=1)
    kept = {"min_pixels": 2 * FRAMES.min_pixels, "max_pixels": 400_000}  # of two frames
    assert body["mm_processor_kwargs"] == {"image": kept}
    assert "x-turbofit-limited" not in reply.headers
    body, reply = sent(max_pixels=10**9, min_pixels=10**9)
    assert "max_pixels=500000000->4816896" in reply.headers["x-turbofit-limited"]
    assert body["mm_processor_kwargs"] == {"image": dict.fromkeys(kept, 2 * FRAMES.max_pixels)}


def test_only_models_and_engines_that_watch_are_sent_videos() -> None:
    for changes in (
        {"rule": replace(RULE, video=None)}, {"engine": "transformers"},
        {"images_per_request": 0, "vision_unit": None},
    ):  # fmt: skip
        status, error = refusal(watching(4), **changes)
        assert (status, error["code"], error["param"]) == (400, "no_videos", "messages")


def test_frames_without_end_are_refused_before_they_are_sent() -> None:
    many = watching(769, size=(8, 8))
    assert refusal(many, bytes_per_body=1 << 24)[1]["code"] == "too_many_frames"
    status, error = refusal(watching(768, size=(640, 8)), limit=102_400)
    assert (status, error["code"]) == (400, "too_many_frames")
    assert "712 patches, the limit" in error["message"]


def test_the_words_between_frames_count_as_the_prompt_does() -> None:
    fit, _, _ = hold_frames(bounds_of(plan_of()), 100, (640, 480))
    assert (fit.text_tokens, fit.frames) == (600, 100)
    assert fit.tokens * 4 == fit.units <= 4096
    app, upstream = gateway(changed(plan_of(), context=fit.tokens + 500))
    reply = ask(app, body=watching(100, max_tokens=10))
    assert (reply.status, upstream.seen) == (400, [])
    assert "tokens" in reply.json["error"]["message"]


def test_large_frames_are_fewer() -> None:
    clip = Clip(url="", frames=500, size=(4096, 2160), rate=25.0)
    fit, keywords = hold_clip(bounds_of(plan_of()), clip, {"num_frames": 400})
    assert fit.frames == 89_478_485 // (4096 * 2160) == 10
    assert fit.lowered[0] == "num_frames=400->10"
    assert keywords["media_io_kwargs"] == {"video": {"num_frames": 10}}
