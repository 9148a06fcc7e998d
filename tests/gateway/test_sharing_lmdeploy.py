"""LMDeploy's own preprocessing as oracle: images that share a request stay within its units."""

from __future__ import annotations

import asyncio
import random
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.gateway.lmdeploy_front import as_lmdeploy_reads, loaded, make
from tests.gateway.test_lmdeploy import lmdeploy  # noqa: F401
from tests.model.conftest import transformers  # noqa: F401 - a fixture
from tests.support.gateway import call, chat, data_url, gateway, image_part, limits_for, picture
from tests.support.oracles import glm, qwen3
from tests.support.oracles import picture as drawn
from tests.support.plans import plausible_plan
from turbofit.core.images import ImageRule
from turbofit.gateway.limits.request_limits import Bounds, RequestedImage
from turbofit.gateway.limits.sharing import hold_images
from turbofit.gateway.overlay import overlay
from turbofit.model.source import resolve_model

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(find_spec("lmdeploy") is None, reason="needs LMDeploy"),
    pytest.mark.filterwarnings("ignore"),
]


def sizes_of(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return [(rng.randrange(40, 1600), rng.randrange(40, 1600)) for _ in range(count)]


def body_of(path: str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Photographs in each turn of a conversation, as clients of this route send them."""
    if path == "/generate":
        images = [data_url(picture(*size, "JPEG"), "image/jpeg") for size in sizes]
        return {"prompt": "x", "image_data": images, "max_tokens": 5}
    if path == "/v1/chat/completions":
        return chat(*[image_part(*size) for size in sizes])
    blocks = [
        {
            "type": "image",
            "source": {
                "type": "base64",
                "media_type": "image/jpeg",
                "data": data_url(picture(*size, "JPEG")).partition(",")[2],
            },
        }
        for size in sizes
    ]
    return {"max_tokens": 5, "model": "m", "messages": [{"role": "user", "content": blocks}]}


@pytest.mark.usefixtures("lmdeploy")
@pytest.mark.parametrize("overlaid", [True, False])
@pytest.mark.parametrize(
    ("family", "limit"), [("internvl", 8), ("internvl-hf", 8), ("qwen2-vl", 602_112)]
)
def test_what_the_gateway_counts_is_what_lmdeploy_makes(tmp_path, family, limit, overlaid) -> None:
    folder, rng = make(family, tmp_path), random.Random(5)
    found = resolve_model(str(folder))
    plan = plausible_plan(
        model=found, limits=limits_for(found.image_rule, limit=limit, images=1, n=1)
    )
    app, recorder = gateway(plan, overlay=overlaid)

    async def run(model) -> None:
        for path in ("/v1/chat/completions", "/v1/messages", "/generate"):
            for count in (1, 2, 3, 5, 7):
                sizes = sizes_of(rng, count)
                reply = await call(app, path, body=body_of(path, sizes))
                assert reply.status == 200, reply.body
                messages = await as_lmdeploy_reads(path, recorder.seen[-1][3])
                answer = model.preprocess(messages)
                tokens = [int(one["image_tokens"]) for one in answer[-1]["content"]]
                assert len(tokens) == count
                most = plan.limits.image_tokens_per_request
                assert sum(tokens) <= most
                if count > 3:
                    assert "->" in reply.headers["x-turbofit-limited"]
                    assert sum(tokens) > most // 3

    with overlay(plan, tmp_path / "overlays") as over:
        asyncio.run(run(loaded(over if overlaid else folder)))


def share(rule: ImageRule, limit: int, sizes, **parameters: Any):
    """Bounds of a plan for one image of this limit, and what they make of these."""
    bounds = Bounds(
        rule=rule, limits=limits_for(rule, limit=limit, images=1), longest_request_tokens=10**9
    )
    wanted = [RequestedImage(size=size, options=parameters, by_request=True) for size in sizes]
    return bounds, hold_images(bounds, wanted)


@pytest.mark.parametrize("family", [qwen3, glm])
@pytest.mark.parametrize("overlaid", [True, False])
def test_pixel_bounds_of_a_request_are_what_lmdeploy_makes(
    transformers,  # noqa: F811
    tmp_path,
    family,
    overlaid,
) -> None:
    folder, rng = tmp_path / "tiny", random.Random(9)
    token = family(transformers, folder)
    found = resolve_model(str(folder))
    rule = found.image_rule
    limit = rule.max_pixels * 3 // 4
    plan = plausible_plan(model=found, limits=limits_for(rule, limit=limit, images=1))
    with overlay(plan, tmp_path / "overlays") as over:
        front = loaded(over if overlaid else folder)
        for count in (1, 1, 2, 2, 3):
            sizes = sizes_of(rng, count)
            parameters = {"max_pixels": limit // 2} if count == 1 else {}
            bounds, shared = share(rule, limit, sizes, **parameters)
            if not overlaid:
                bounds = replace(bounds, overlay=False)
                wanted = [
                    RequestedImage(size=size, options=parameters, by_request=True) for size in sizes
                ]
                shared = hold_images(bounds, wanted)
            items = [{"type": "image", "data": drawn(*size)} for size in sizes]
            prompt = "a" + "b".join([token] * count)
            answer = front.preprocess(
                [{"role": "user", "content": items}],
                prompt,
                {"image": shared.request} if shared.request else None,
            )
            tokens = answer["input_ids"].count(front.image_token_id)
            assert tokens == sum(held.tokens for held in shared.images)
            assert shared.request or all(
                held.tokens == rule.tokens(*size, limit if overlaid else None)
                for size, held in zip(sizes, shared.images, strict=True)
            )


def test_a_request_of_less_is_kept_and_said_only_where_it_is_more() -> None:
    from tests.gateway.test_new_rules import FRAMES

    plan = plausible_plan(model=replace(plausible_plan().model, image_rule=FRAMES))
    plan = replace(
        plan, limits=limits_for(FRAMES, images=1), engine=replace(plan.engine, name="pytorch")
    )
    app, recorder = gateway(plan)

    def sent(**parameters: Any):
        body = chat(image_part(1000, 800), mm_processor_kwargs={"image": parameters})
        reply = asyncio.run(call(app, body=body))
        assert reply.status == 200
        return msgspec.json.decode(recorder.seen[-1][3]).get("mm_processor_kwargs"), reply.headers

    kept, headers = sent(max_pixels=400_000)
    assert kept == {"image": {"min_pixels": 12_544, "max_pixels": 400_000}}
    assert "x-turbofit-limited" not in headers
    lowered, headers = sent(max_pixels=10**9, min_pixels=10**9)
    assert lowered is None or lowered["image"]["max_pixels"] <= 2 * FRAMES.max_pixels
    assert "max_pixels=500000000->4816896" in headers["x-turbofit-limited"]
