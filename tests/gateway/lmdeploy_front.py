"""Bent bodies through the gateway into LMDeploy's own preprocessing; any torch will do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from tests.support.checkpoints import make_internvl2, make_internvl_hf, make_qwen2_vl
from tests.support.gateway import call, gateway, limits_for
from tests.support.mutations import Mutator
from tests.support.plans import plausible_plan
from turbofit.model.source import resolve_model


def make(family: str, folder: Path) -> Path:
    if family == "internvl":
        return make_internvl2(folder / "InternVL2-1B")
    if family == "internvl-hf":
        return make_internvl_hf(folder / "InternVL3-1B-hf")
    checkpoint = make_qwen2_vl(folder / "Qwen2-VL-2B-Instruct")
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["num_heads"] = 1  # heads of 64, as TurboMind needs
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


def plan_of(folder: Path, limit: int):
    resolved = resolve_model(str(folder))
    return plausible_plan(model=resolved, limits=limits_for(resolved.image_rule, limit=limit))


async def drive(plan, model, *, count: int, seed: int, overlaid: bool) -> tuple[list[int], int]:
    """Bent bodies through the gateway into LMDeploy's own code: tokens seen, bodies passed."""
    app, recorder = gateway(plan, overlay=overlaid)
    mutator, reached, most = Mutator(seed), [], plan.promise.limits.image_tokens_per_request
    for _ in range(count):
        path, raw = mutator.request()
        before = len(recorder.seen)
        assert (await call(app, path, raw=raw, method="POST")).status < 500
        if len(recorder.seen) == before:
            continue
        messages = await as_lmdeploy_reads(path, recorder.seen[-1][3])
        if messages is None:
            continue
        answer = model.preprocess(messages)
        tokens = [int(item["image_tokens"]) for item in answer[-1]["content"]]
        assert sum(tokens) <= most
        assert all(item <= most // plan.promise.limits.images_per_request for item in tokens)
        reached += tokens
    return reached, len(recorder.seen)


async def as_lmdeploy_reads(path: str, raw: bytes) -> list[dict[str, Any]] | None:
    """The messages that LMDeploy's own conversions make of a body; None where it has no images.

    None too where LMDeploy itself answers 4xx.
    """
    from lmdeploy.serve.anthropic.adapter import to_openai_messages
    from lmdeploy.serve.anthropic.protocol import MessagesRequest
    from lmdeploy.serve.openai import protocol
    from lmdeploy.serve.processors import MultimodalProcessor
    from pydantic import ValidationError

    kinds = {
        "/v1/chat/completions": protocol.ChatCompletionRequest, "/v1/messages": MessagesRequest,
        "/generate": protocol.GenerateReqInput, "/v1/completions": protocol.CompletionRequest,
    }  # fmt: skip
    if path not in kinds:
        return None
    try:
        request = kinds[path].model_validate(msgspec.json.decode(raw))
    except ValidationError:
        return None
    if path == "/v1/completions":
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        assert all(isinstance(prompt, str) for prompt in prompts)
        return None
    messages: Any = getattr(request, "messages", None) or []
    if path == "/v1/messages" and messages:
        messages = to_openai_messages(request)
    if not messages and (images := request.image_data) is not None:
        parts = [
            {"type": "image_url", "image_url": {"url": image} if isinstance(image, str) else image}
            for image in (images if isinstance(images, list) else [images])
        ]
        messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}]
    processor = MultimodalProcessor(None, None)
    if not processor._has_multimodal_input(messages):
        return None
    return await processor.async_parse_multimodal_item(messages)
