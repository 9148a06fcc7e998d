"""What LMDeploy 0.18 would read out of a body that reached it; written apart from the gateway.

Follows LMDeploy's own conversions (multimodal.py, the Messages adapter, generate.py, completions)
as they are, so that whatever the gateway overlooks shows up here.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import msgspec
from msgspec.structs import replace
from PIL import Image

MULTIMODAL = (
    "image_url", "image_data", "image", "video_url", "video", "audio_url", "audio",
    "time_series_url", "time_series",
)  # fmt: skip


def images_of(path: str, body: dict[str, Any]) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Size and parameters of every image; anything else that could be media fails."""
    if path == "/v1/completions":
        prompt = body["prompt"]
        assert all(
            isinstance(item, str) for item in ([prompt] if isinstance(prompt, str) else prompt)
        )
        return []
    if path == "/v1/messages/count_tokens":
        return []  # whatever is in there, it is counted as text
    if path == "/v1/responses":
        assert not any("image" in kind for kind in _types(body.get("input", [])))
        return []
    messages = body.get("messages") or []
    if path == "/v1/messages":
        messages = _from_anthropic(messages)
    given = body.get("image_data")
    if given is not None and (path == "/generate" or not messages):
        parts = [
            {"type": "image_url", "image_url": {"url": item} if isinstance(item, str) else item}
            for item in (given if isinstance(given, list) else [given])
        ]
        messages = [{"role": "user", "content": parts}]
    return [] if isinstance(messages, str) else [i for m in messages for i in _message(m)]


def units_reaching(rule, default: int, size: tuple[int, int], params: dict[str, Any]) -> int:
    """Units as LMDeploy and Transformers would make them of this image."""
    if rule.limit_name == "max_dynamic_patch":
        patch = params.get("max_dynamic_patch")
        if patch is None or not isinstance(patch, int):
            table = {"low": 6, "medium": 12, "high": 24}
            patch = table.get(params.get("detail", "default"), default)
        return rule.units(*size, patch)
    low, high = params.get("min_pixels"), params.get("max_pixels")
    if low is None or high is None:  # one alone is ignored
        low, high = min(rule.min_pixels, default), default
    return replace(rule, min_pixels=low, max_pixels=high).units(*size)


def _message(message: dict[str, Any]):
    assert message["role"] not in ("preprocess", "forward")
    content = message.get("content")
    if not isinstance(content, list):
        return
    for item in content:
        if item["type"] == "text":
            continue
        assert message["role"] in ("user", "tool"), "LMDeploy would hand this on unread"
        assert item["type"] in MULTIMODAL[:3], item["type"]
        value = item[item["type"]]
        if isinstance(value, dict):
            params = dict(value)
            source = params.pop("url", None) or params.pop("data", None)
        else:
            params = {k: v for k, v in item.items() if k not in ("type", item["type"])}
            source = value
        assert item["type"] != "image_data", "its data goes to the preprocessor as it is"
        yield _size(source), params


def _size(source: Any) -> tuple[int, int]:
    assert isinstance(source, str)
    head, _, data = source.partition(",")
    assert head.startswith("data:image/"), head[:40]
    assert head.endswith(";base64")
    assert head.count(";") == 1
    assert not set(data) & set("#?,; \n"), "urlparse would cut it"
    with Image.open(BytesIO(base64.b64decode(data, validate=True))) as image:
        return image.size


def _from_anthropic(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for message in messages:
        if message["role"] == "system" or isinstance(message["content"], str):
            continue
        parts = []
        for block in message["content"]:
            if block["type"] == "image":
                parts.append(_converted(block))
            elif block["type"] == "tool_result" and isinstance(block.get("content"), list):
                inner = [_converted(b) for b in block["content"] if b.get("type") == "image"]
                if message["role"] == "user" and inner:
                    out.append({"role": "user", "content": inner})
        out.append({"role": message["role"], "content": parts})
    return out


def _converted(block: dict[str, Any]) -> dict[str, Any]:
    source = block["source"]
    assert source["type"] == "base64"
    return {
        "type": "image_url",
        "image_url": {"url": f"data:{source['media_type']};base64,{source['data']}"},
    }


def _types(value: Any) -> set[str]:
    if isinstance(value, dict):
        kind = value.get("type")
        kinds = {kind} if isinstance(kind, str) else set()
        return kinds.union(*(_types(v) for v in value.values()))
    if isinstance(value, list):
        return set().union(*(_types(v) for v in value))
    return set()


def check_body(rule, limits, default, path, raw) -> None:
    """The body as LMDeploy would read it is within the limits."""
    body = msgspec.json.decode(raw)
    images = images_of(path, body)
    counts = [units_reaching(rule, default, size, params) for size, params in images]
    assert len(counts) <= limits.units_per_request
    assert all(count <= limits.units_per_image for count in counts), (counts, images)
    assert sum(counts) <= limits.units_per_request
    assert (body.get("n") or 1) <= (limits.n if images else 128)
