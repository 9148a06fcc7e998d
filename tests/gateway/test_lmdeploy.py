"""LMDeploy's own code as oracle: its preprocessing, its conversions, its routes and fields."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.lmdeploy_front import drive, loaded, make, plan_of
from tests.support.gateway import call, chat, gateway, image_part
from turbofit.gateway.http.routes import MANAGEMENT, ROUTES
from turbofit.gateway.limits.parameters import RULES, passed
from turbofit.gateway.overlay import overlay
from turbofit.model.source import resolve_model

pytestmark = [
    pytest.mark.lmdeploy,
    pytest.mark.skipif(find_spec("lmdeploy") is None, reason="needs LMDeploy"),
    pytest.mark.filterwarnings("ignore"),
]

SURFACE = Path(__file__).with_name("lmdeploy_surface.json")
#: Operators live as long as the library that defines them.
#: Where LMDeploy turns a request into images, or only tokenises it; a change there must be read by
#: somebody.
FILES = (
    "serve/processors/multimodal.py", "serve/anthropic/adapter.py",
    "serve/anthropic/endpoints/messages.py", "serve/openai/endpoints/generate.py",
    "serve/openai/endpoints/completions.py", "serve/openai/chat_completions/serving.py",
    "serve/openai/chat_completions/fanout.py", "serve/openai/responses/request.py",
    "serve/openai/endpoints/auxiliary.py",
    "vl/media/image.py", "vl/media/connection.py", "vl/model/internvl.py",
    "vl/model/internvl3_hf.py", "vl/model/qwen2.py",
)  # fmt: skip


@pytest.fixture(scope="module")
def lmdeploy():
    import lmdeploy as module

    return module


def preprocessed(model, messages) -> list[int]:
    """Image tokens of each image, as LMDeploy's front end counts them."""
    from lmdeploy.serve.processors import MultimodalProcessor

    parsed = asyncio.run(MultimodalProcessor.async_parse_multimodal_item(messages))
    answer = model.preprocess(parsed)
    return [int(one["image_tokens"]) for one in answer[-1]["content"]]


@pytest.mark.parametrize(
    ("family", "limit", "size", "before", "after"),
    [
        ("internvl", 4, (448, 5376), 13 * 256, 5 * 256),
        ("internvl-hf", 4, (448, 5376), 13 * 256, 5 * 256),
        ("qwen2-vl", 1_003_520, (3584, 1792), 64 * 128, 1250),
    ],
)
def test_the_overlay_is_what_lmdeploy_reads(
    lmdeploy, tmp_path, family, limit, size, before, after
) -> None:
    folder = make(family, tmp_path)
    plan = plan_of(folder, limit)
    messages = [{"role": "user", "content": [image_part(*size)]}]
    assert preprocessed(loaded(folder), messages) == [before]
    with overlay(plan, tmp_path / "overlays") as over:
        assert over.name == folder.name
        assert preprocessed(loaded(over), messages) == [after]
        again = resolve_model(str(over))
        assert again.weight_bytes == plan.model.weight_bytes
    assert not over.exists()


@pytest.mark.parametrize(
    ("family", "limit", "overlaid"),
    [
        ("internvl", 6, True),
        ("internvl", 6, False),
        ("internvl-hf", 6, True),
        ("internvl-hf", 6, False),
        ("qwen2-vl", 602_112, True),
        ("qwen2-vl", 602_112, False),
    ],
)
def test_nothing_past_the_limits_reaches_the_preprocessor(
    lmdeploy, tmp_path, family, limit, overlaid
) -> None:
    folder = make(family, tmp_path)
    plan = plan_of(folder, limit)
    with overlay(plan, tmp_path / "overlays") as over:
        model = loaded(over if overlaid else folder)
        reached, passed = asyncio.run(drive(plan, model, count=60, seed=3, overlaid=overlaid))
    assert passed > 5
    assert reached


def test_knobs_that_pass_are_those_that_lmdeploy_obeys(lmdeploy, tmp_path) -> None:
    """A smaller limit that a client asks for really arrives."""
    for family, limit, knobs, tokens in (
        ("internvl", 12, {"max_dynamic_patch": 3}, 4 * 256),
        ("internvl", 12, {"detail": "low"}, 7 * 256),
        ("qwen2-vl", 12_845_056, {"max_pixels": 313_600}, 392),
    ):
        folder = make(family, tmp_path / str(tokens))
        app, recorder = gateway(plan_of(folder, limit))
        body = chat(image_part(448, 5376 // 2 if family == "internvl" else 448 * 2, **knobs))
        assert asyncio.run(call(app, body=body)).status == 200
        assert preprocessed(loaded(folder), recorder.bodies[0]["messages"]) == [tokens]


def surface() -> dict[str, Any]:
    """Routes, fields and the code that carries images, of the LMDeploy that is installed."""
    spec = find_spec("lmdeploy")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    return {
        "version": version("lmdeploy"),
        "routes": sorted(_routes(root / "serve")),
        "fields": _fields(),
        "files": {
            name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:16] for name in FILES
        },
    }


def _routes(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        if "proxy" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("get", "post", "put", "delete", "api_route")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("router", "app")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                found.add(f"{node.func.attr.upper()} {node.args[0].value}")
    return found


def _fields() -> dict[str, list[str]]:
    from lmdeploy.serve.processors.multimodal import MULTIMODAL_TYPES

    named = {kind: sorted(model.model_fields) for kind, model in models().items()}
    return {**named, "parts": sorted(MULTIMODAL_TYPES)}


def test_no_route_or_field_has_begun_to_carry_images_unread(lmdeploy) -> None:
    """Fails with each new LMDeploy: read what changed, then run this module.

    What to look for: other routes or fields that carry images, other knobs beside an image, other
    places where a URL or a path is opened.
    """
    recorded = json.loads(SURFACE.read_text())
    assert surface() == recorded


def test_every_route_is_passed_or_closed(lmdeploy) -> None:
    paths = {route.partition(" ")[2] for route in surface()["routes"]}
    assert paths == (paths & set(ROUTES)) | (paths & MANAGEMENT)


def models() -> dict[str, Any]:
    """The request models of the installed LMDeploy, by kind of route."""
    from lmdeploy.serve.anthropic.protocol import CountTokensRequest, MessagesRequest
    from lmdeploy.serve.openai.protocol import (
        ChatCompletionRequest,
        CompletionRequest,
        EncodeRequest,
        GenerateReqInput,
    )
    from lmdeploy.serve.openai.responses.protocol import ResponsesRequest

    return {
        "chat": ChatCompletionRequest,
        "completions": CompletionRequest,
        "generate": GenerateReqInput,
        "messages": MessagesRequest,
        "count_tokens": CountTokensRequest,
        "responses": ResponsesRequest,
        "encode": EncodeRequest,
    }


def test_the_table_knows_every_field_of_the_installed_request_models(lmdeploy) -> None:
    """A field of a new version fails here: somebody must read what the engine does with it."""
    declared = {kind: set(model.model_fields) for kind, model in models().items()}
    assert {kind: set(rules) for kind, rules in RULES.items()} == declared


def test_only_sessions_are_not_passed_on() -> None:
    for kind, rules in RULES.items():
        assert set(rules) - passed(kind) <= {"session_id"}


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
