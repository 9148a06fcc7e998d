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

import msgspec
import pytest

from tests.checkpoints import make_internvl2, make_internvl_hf, make_qwen2_vl
from tests.fixtures.plans import plausible_plan
from tests.gateway.mutations import Mutator
from tests.gateway.support import call, chat, gateway, image_part, limits_for
from tests.launch.standin.standin_engine import shim_torchvision
from turbofit.gateway.overlay import overlay
from turbofit.gateway.parameters import RULES, passed
from turbofit.gateway.routes import MANAGEMENT, ROUTES
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
    """LMDeploy over CPU torch, whose torchvision lacks two compiled operators."""
    shim_torchvision()
    import lmdeploy as module

    return module


def make(family: str, folder: Path) -> Path:
    if family == "internvl":
        return make_internvl2(folder / "InternVL2-1B")
    if family == "internvl-hf":
        return make_internvl_hf(folder / "InternVL3-1B-hf")
    made = make_qwen2_vl(folder / "Qwen2-VL-2B-Instruct")
    config = json.loads((made / "config.json").read_text())
    config["vision_config"]["num_heads"] = 1  # heads of 64, as TurboMind needs
    (made / "config.json").write_text(json.dumps(config))
    return made


def plan_of(folder: Path, limit: int):
    found = resolve_model(str(folder))
    return plausible_plan(model=found, limits=limits_for(found.image_rule, limit=limit))


def loaded(folder: Path):
    import torch
    from lmdeploy.vl.model.builder import load_vl_model

    model = load_vl_model(str(folder), "pytorch")
    model.set_mm_feature_dtype(torch.bfloat16)
    return model


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


async def drive(
    plan, model, *, count: int, seed: int, overlaid: bool = True
) -> tuple[list[int], int]:
    """Bent bodies through the gateway into LMDeploy's own code; returns the tokens seen."""
    app, recorder = gateway(plan, overlay=overlaid)
    mutator, reached, passed = Mutator(seed, large=False), [], 0
    for _ in range(count):
        path, raw = mutator.request()
        before = len(recorder.seen)
        reply = await call(app, path, raw=raw, method="POST")
        assert reply.status < 500
        if len(recorder.seen) == before:
            continue
        passed += 1
        messages = await as_lmdeploy_reads(path, recorder.seen[-1][3])
        if messages is None:
            continue
        answer = model.preprocess(messages)
        tokens = [int(one["image_tokens"]) for one in answer[-1]["content"]]
        each = plan.limits.image_tokens_per_request // plan.limits.images_per_request
        assert sum(tokens) <= plan.limits.image_tokens_per_request
        assert all(one <= each for one in tokens)
        reached += tokens
    return reached, passed


async def as_lmdeploy_reads(path: str, raw: bytes) -> list[dict[str, Any]] | None:
    """The messages that LMDeploy's own conversions make of a body; None where it has no images.

    None too where LMDeploy itself answers 4xx.
    """
    from lmdeploy.serve.anthropic.adapter import to_openai_messages
    from lmdeploy.serve.anthropic.protocol import MessagesRequest
    from lmdeploy.serve.openai.protocol import (
        ChatCompletionRequest,
        CompletionRequest,
        GenerateReqInput,
    )
    from lmdeploy.serve.processors import MultimodalProcessor
    from pydantic import ValidationError

    kinds = {
        "/v1/chat/completions": ChatCompletionRequest, "/v1/messages": MessagesRequest,
        "/generate": GenerateReqInput, "/v1/completions": CompletionRequest,
    }  # fmt: skip
    body = msgspec.json.decode(raw)
    if path not in kinds:
        return None
    try:
        request = kinds[path].model_validate(body)
    except ValidationError:
        return None
    if path == "/v1/completions":
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        assert all(isinstance(prompt, str) for prompt in prompts)
        return None
    messages: Any = getattr(request, "messages", None) or []
    if path == "/v1/messages" and messages:
        messages = to_openai_messages(request)
    if not messages and request.image_data is not None:
        listed = (
            request.image_data if isinstance(request.image_data, list) else [request.image_data]
        )
        parts = [
            {"type": "image_url", "image_url": {"url": one} if isinstance(one, str) else one}
            for one in listed
        ]
        messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}]
    processor = MultimodalProcessor(None, None)
    if not processor._has_multimodal_input(messages):
        return None
    return await processor.async_parse_multimodal_item(messages)


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
