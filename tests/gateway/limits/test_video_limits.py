"""Videos through the gateway: each is held to what the plan paid for one image."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from msgspec.structs import replace

from tests.gateway.media.test_clips import sequence
from tests.gateway.media.test_films import film, opencv
from tests.support.gateway import ask, chat, data_url, gateway, image_part, limits_for
from tests.support.plans import model, plausible_plan
from turbofit.core.images import PatchRule, VideoRule
from turbofit.gateway.limits.request_limits import bounds_of
from turbofit.gateway.limits.video_limits import hold_clip, hold_frames

RULE = PatchRule(
    patch_size=16, merge=2, min_pixels=65_536, max_pixels=16_777_216, client_knobs=False,
    video=VideoRule(merged_frames=2, min_pixels=4096, max_pixels=25_165_824),
)  # fmt: skip
LIMIT = 1_048_576  # 4,096 patches, 1,024 tokens


def plan_of(rule=RULE, engine: str = "pytorch", limit: int = LIMIT, **changes: Any):
    plan = plausible_plan(model=model(image_rule=rule), limits=limits_for(rule, limit=limit))
    plan = replace(plan, engine=replace(plan.engine, name=engine))
    return replace(plan, limits=replace(plan.limits, **changes))


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


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
    url = sequence(9, (640, 480))
    body, reply = passed(chat(video_part(url)))
    assert body["messages"][0]["content"][1] == video_part(url)
    assert body["media_io_kwargs"] == {"video": {"num_frames": 9, "fps": 2.0}}
    bounds = body["mm_processor_kwargs"]["video"]
    units = RULE.videos.units(9, 640, 480, **bounds)
    assert 2000 < units <= 4096
    assert "x-turbofit-limited" not in reply.headers


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
@pytest.mark.skipif(find_spec("lmdeploy") is None, reason="needs LMDeploy")
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
    frames, seen = load_from_url(sent, VideoMediaIO(image_io=ImageMediaIO(), **keywords))
    assert frames.shape[0] == 7 == len(seen["frames_indices"])
    assert frames.shape[1:] == ((48, 64, 3) if kind == "jpeg" else (240, 320, 3))


def test_a_video_and_images_share_the_request() -> None:
    body, _ = passed(chat(video_part(sequence(4, (64, 48))), image_part(64, 64)))
    assert len(body["messages"][0]["content"]) == 3
    large = [image_part(4000, 3000) for _ in range(3)]
    body, reply = passed(chat(video_part(sequence(32, (640, 480))), *large))
    bounds = body["mm_processor_kwargs"]
    taken = RULE.videos.units(32, 640, 480, **bounds["video"])
    taken += 3 * replace(RULE, **bounds["image"]).units(4000, 3000)
    most = plan_of().limits.units_per_request
    assert 0.8 * most < taken <= most
    said = f"max_pixels={LIMIT}->{bounds['image']['max_pixels']}"
    assert said in reply.headers["x-turbofit-limited"]
    two = chat(*[video_part(sequence(4, (64, 48)))] * 2)
    assert refusal(two)[1]["code"] == "too_many_videos"


def test_what_is_asked_beyond_the_plan_is_lowered_and_said() -> None:
    parameters = {"video": {"max_pixels": 10**8, "min_pixels": 10**8}, "image": {"max_pixels": 1}}
    body, reply = passed(chat(video_part(sequence(4, (640, 480))), mm_processor_kwargs=parameters))
    bounds = body["mm_processor_kwargs"]
    assert set(bounds) == {"video"}
    assert bounds["video"]["min_pixels"] < bounds["video"]["max_pixels"] < 10**8
    said = reply.headers["x-turbofit-limited"]
    assert "mm_processor_kwargs=image->none" in said
    assert f"max_pixels=100000000->{bounds['video']['max_pixels']}" in said
    less = {"video": {"max_pixels": 102_400}}
    body, reply = passed(chat(video_part(sequence(4, (640, 480))), mm_processor_kwargs=less))
    assert body["mm_processor_kwargs"]["video"]["max_pixels"] == 102_400
    assert "x-turbofit-limited" not in reply.headers


def test_only_models_and_engines_that_watch_are_sent_videos() -> None:
    body = chat(video_part(sequence(4, (64, 48))))
    for changes in ({"rule": replace(RULE, video=None)}, {"engine": "transformers"}):
        status, error = refusal(body, **changes)
        assert (status, error["code"], error["param"]) == (400, "no_videos", "messages")
    assert refusal(body, images_per_request=0, vision_unit=None)[1]["code"] == "no_videos"


def test_frames_without_end_are_refused_before_they_are_sent() -> None:
    body = chat(video_part(sequence(769, (8, 8))))
    assert refusal(body, bytes_per_body=1 << 24)[1]["code"] == "too_many_frames"
    strips = chat(video_part(sequence(768, (640, 8))))
    status, error = refusal(strips, limit=102_400)
    assert (status, error["code"]) == (400, "too_many_frames")
    assert "patches planned for" in error["message"]


def test_the_words_between_frames_count_as_the_prompt_does() -> None:
    bounds = bounds_of(plan_of())
    held, _, _ = hold_frames(bounds, 100, (640, 480))
    assert (held.text_tokens, held.frames) == (600, 100)
    assert held.tokens * 4 == held.units <= 4096
    short = replace(plan_of(), kv=replace(plan_of().kv, longest_request_tokens=held.tokens + 500))
    app, upstream = gateway(short)
    reply = ask(app, body=chat(video_part(sequence(100, (640, 480))), max_tokens=10))
    assert (reply.status, upstream.seen) == (400, [])
    assert "tokens" in reply.json["error"]["message"]


def test_large_frames_are_fewer() -> None:
    from turbofit.gateway.media.clips import Clip

    clip = Clip(url="", frames=500, size=(4096, 2160), bytes=1, rate=25.0)
    held, keywords = hold_clip(bounds_of(plan_of()), clip, {"num_frames": 400})
    assert held.frames == 89_478_485 // (4096 * 2160) == 10
    assert held.lowered[0] == "num_frames=400->10"
    assert keywords["media_io_kwargs"] == {"video": {"num_frames": 10}}
