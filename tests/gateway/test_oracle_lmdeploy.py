"""LMDeploy's own code as oracle: its preprocessing, its conversions, its routes and fields."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.lmdeploy_front import as_lmdeploy_reads, drive, make, plan_of
from tests.model.conftest import transformers  # noqa: F401 - a fixture
from tests.support.gateway import (
    anthropic,
    ask,
    call,
    chat,
    data_url,
    gateway,
    image_part,
    limits_for,
    picture,
    promise_for,
)
from tests.support.oracles import front_end, glm, qwen3
from tests.support.oracles import picture as drawn
from tests.support.plans import plausible_plan
from turbofit.gateway.http.routes import MANAGEMENT, ROUTES
from turbofit.gateway.limits.ranges import RULES, passed_fields
from turbofit.gateway.limits.request_limits import Bounds, RequestedImage
from turbofit.gateway.limits.sharing import hold_images
from turbofit.model.source import resolve_model
from turbofit.serving.overlay import make_overlay

pytestmark = [pytest.mark.lmdeploy, pytest.mark.filterwarnings("ignore")]

SURFACE = Path(__file__).with_name("lmdeploy_surface.json")
#: Where LMDeploy turns a request into images; a change there must be read by somebody.
FILES = (
    "serve/processors/multimodal.py", "serve/anthropic/adapter.py",
    "serve/anthropic/endpoints/messages.py", "serve/openai/endpoints/generate.py",
    "serve/openai/endpoints/completions.py", "serve/openai/chat_completions/serving.py",
    "serve/openai/chat_completions/fanout.py", "serve/openai/responses/request.py",
    "vl/media/image.py", "vl/media/connection.py", "vl/model/internvl.py",
    "vl/model/internvl3_hf.py", "vl/model/qwen2.py",
)  # fmt: skip


def preprocessed(model, messages) -> list[int]:
    """Image tokens of each image, as LMDeploy's front end counts them."""
    from lmdeploy.serve.processors import MultimodalProcessor

    parsed = asyncio.run(MultimodalProcessor.async_parse_multimodal_item(messages))
    answer = model.preprocess(parsed)
    return [int(part["image_tokens"]) for part in answer[-1]["content"]]


@pytest.mark.parametrize(
    ("family", "limit", "size", "before", "after"),
    [
        ("internvl", 4, (448, 5376), 13 * 256, 5 * 256),
        ("internvl-hf", 4, (448, 5376), 13 * 256, 5 * 256),
        ("qwen2-vl", 1_003_520, (3584, 1792), 64 * 128, 1250),
    ],
)
def test_the_overlay_is_what_lmdeploy_reads(tmp_path, family, limit, size, before, after) -> None:
    folder = make(family, tmp_path)
    plan = plan_of(folder, limit)
    messages = [{"role": "user", "content": [image_part(*size)]}]
    assert preprocessed(front_end(folder), messages) == [before]
    over = make_overlay(plan, tmp_path / "overlays")
    assert over.name == folder.name
    assert preprocessed(front_end(over), messages) == [after]
    assert resolve_model(str(over)).weight_bytes == plan.model.weight_bytes


OVERLAID = pytest.mark.parametrize("overlaid", [True, False])
FAMILIES = pytest.mark.parametrize(
    ("family", "limit", "overlaid"),
    [
        ("internvl", 6, True), ("internvl-hf", 6, False), ("qwen2-vl", 602_112, True),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (
            ("internvl", 6, False), ("internvl-hf", 6, True), ("qwen2-vl", 602_112, False),
        )),
    ],
)  # fmt: skip


@FAMILIES
def test_nothing_past_the_limits_reaches_the_preprocessor(
    tmp_path, family, limit, overlaid
) -> None:
    folder = make(family, tmp_path)
    plan = plan_of(folder, limit)
    over = make_overlay(plan, tmp_path / "overlays")
    model = front_end(over if overlaid else folder)
    reached, passed = asyncio.run(drive(plan, model, count=80, seed=3, overlaid=overlaid))
    assert passed > 20
    assert reached


@pytest.mark.parametrize(
    ("family", "limit", "height", "knobs", "tokens"),
    [
        ("internvl", 12, 2688, {"max_dynamic_patch": 3}, 4 * 256),
        ("internvl", 12, 2688, {"detail": "low"}, 7 * 256),
        ("qwen2-vl", 12_845_056, 896, {"max_pixels": 313_600}, 392),
    ],
)
def test_knobs_that_pass_are_those_that_lmdeploy_obeys(
    tmp_path, family, limit, height, knobs, tokens
) -> None:
    """A smaller limit that a client asks for really arrives."""
    folder = make(family, tmp_path)
    app, recorder = gateway(plan_of(folder, limit))
    assert ask(app, body=chat(image_part(448, height, **knobs))).status == 200
    assert preprocessed(front_end(folder), recorder.bodies[0]["messages"]) == [tokens]


def surface() -> dict[str, Any]:
    """Routes, fields and the code that carries images, of the LMDeploy that is installed."""
    import lmdeploy
    from lmdeploy.serve.processors.multimodal import MULTIMODAL_TYPES

    root = Path(lmdeploy.__file__).parent
    fields = {kind: sorted(model.model_fields) for kind, model in models().items()}
    return {
        "version": version("lmdeploy"),
        "routes": sorted(_routes(root / "serve")),
        "fields": {**fields, "parts": sorted(MULTIMODAL_TYPES)},
        "files": {
            name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:16] for name in FILES
        },
    }


def _routes(folder: Path) -> set[str]:
    texts = [path.read_text() for path in folder.rglob("*.py") if "proxy" not in path.parts]
    route = r"\b(?:router|app)\.(get|post|put|delete|api_route)\(\s*[\"']([^\"']+)"
    return {f"{kind.upper()} {path}" for kind, path in re.findall(route, "\n".join(texts))}


def test_no_route_or_field_has_begun_to_carry_images_unread() -> None:
    """Fails with each new LMDeploy: read what changed, then run this module.

    What to look for: other routes or fields that carry images, other knobs beside an image, other
    places where a URL or a path is opened.
    """
    found = surface()
    assert found == json.loads(SURFACE.read_text())
    assert {route.partition(" ")[2] for route in found["routes"]} <= {*ROUTES, *MANAGEMENT}


def models() -> dict[str, Any]:
    """The request models of the installed LMDeploy, by kind of route."""
    from lmdeploy.serve.anthropic import protocol as anthropic
    from lmdeploy.serve.openai import protocol as openai
    from lmdeploy.serve.openai.responses.protocol import ResponsesRequest

    return {
        "chat": openai.ChatCompletionRequest,
        "completions": openai.CompletionRequest,
        "generate": openai.GenerateReqInput,
        "messages": anthropic.MessagesRequest,
        "count_tokens": anthropic.CountTokensRequest,
        "responses": ResponsesRequest,
    }


def test_the_table_knows_every_field_of_the_installed_request_models() -> None:
    """A field of a new version fails here: somebody must read what the engine does with it."""
    declared = {kind: set(model.model_fields) for kind, model in models().items()}
    assert {kind: set(rules) for kind, rules in RULES.items()} == declared
    # Sessions are not passed on, nor is a prompt whose variables could hold images.
    left = {
        (kind, name) for kind, rules in RULES.items() for name in set(rules) - passed_fields(kind)
    }
    assert {name for kind, name in left if kind != "responses"} == {"session_id"}
    assert ("responses", "prompt") in left


def sizes_of(rng: random.Random, count: int) -> list[tuple[int, int]]:
    return [(rng.randrange(40, 1600), rng.randrange(40, 1600)) for _ in range(count)]


def body_of(path: str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Photographs in each turn of a conversation, as clients of this route send them."""
    if path == "/v1/chat/completions":
        return chat(*[image_part(*size) for size in sizes])
    photographs = [picture(*size, "JPEG") for size in sizes]
    if path == "/v1/messages":
        return anthropic(*photographs, model="m")
    return {"prompt": "x", "image_data": list(map(data_url, photographs)), "max_tokens": 5}


@FAMILIES
def test_what_the_gateway_counts_is_what_lmdeploy_makes(tmp_path, family, limit, overlaid) -> None:
    folder, rng = make(family, tmp_path), random.Random(5)
    resolved = resolve_model(str(folder))
    limits = limits_for(resolved.image_rule, limit=limit, images=1, n=1)
    plan = plausible_plan(model=resolved, limits=limits)
    app, recorder = gateway(plan, overlay=overlaid)
    most = limits.image_tokens_per_request

    async def run(model) -> None:
        for path in ("/v1/chat/completions", "/v1/messages", "/generate"):
            for count in (1, 3, 7):
                reply = await call(app, path, body=body_of(path, sizes_of(rng, count)))
                assert reply.status == 200, reply.body
                messages = await as_lmdeploy_reads(path, recorder.seen[-1][3])
                answer = model.preprocess(messages)
                tokens = [int(part["image_tokens"]) for part in answer[-1]["content"]]
                assert len(tokens) == count
                assert sum(tokens) <= most
                if count > 3:
                    assert "->" in reply.headers["x-turbofit-limited"]
                    assert sum(tokens) > most // 3

    over = make_overlay(plan, tmp_path / "overlays")
    asyncio.run(run(front_end(over if overlaid else folder)))


@pytest.mark.parametrize("family", [qwen3, glm])
@OVERLAID
def test_pixel_bounds_of_a_request_are_what_lmdeploy_makes(
    transformers,  # noqa: F811
    tmp_path,
    family,
    overlaid,
) -> None:
    folder, rng = tmp_path / "tiny", random.Random(9)
    token = family(transformers, folder)
    resolved = resolve_model(str(folder))
    rule = resolved.image_rule
    limit = rule.max_pixels * 3 // 4
    limits = limits_for(rule, limit=limit, images=1)
    bounds = Bounds(rule=rule, promise=promise_for(limits), overlay=overlaid)
    over = make_overlay(plausible_plan(model=resolved, limits=limits), tmp_path / "overlays")
    front = front_end(over if overlaid else folder)
    for count in (1, 1, 2, 2, 3):
        sizes = sizes_of(rng, count)
        options = {"max_pixels": limit // 2} if count == 1 else {}
        wanted = [RequestedImage(size=size, options=options, by_request=True) for size in sizes]
        shared = hold_images(bounds, wanted)
        items = [{"type": "image", "data": drawn(*size)} for size in sizes]
        answer = front.preprocess(
            [{"role": "user", "content": items}],
            "a" + "b".join([token] * count),
            {"image": shared.request} if shared.request else None,
        )
        tokens = answer["input_ids"].count(front.image_token_id)
        assert tokens == sum(limited.tokens for limited in shared.images)
        assert shared.request or all(
            limited.tokens == rule.tokens(*size, limit if overlaid else None)
            for size, limited in zip(sizes, shared.images, strict=True)
        )


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
