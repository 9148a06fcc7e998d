"""What a body holds: images and videos in every shape, and shapes that are refused."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.gateway.limits.test_request_limits import refused
from tests.support.gateway import (
    chat,
    data_url,
    image_part,
    picture,
)
from turbofit.gateway.limits.request_body import read_body
from turbofit.gateway.media.pictures import Picture

URL = data_url(picture(8, 8))


def drawn(base64: str) -> Picture:
    return Picture(mime="image/png", base64=base64, size=(1, 1))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL, "max_dynamic_patch": 99}},
        {"type": "image_url", "image_url": URL, "max_dynamic_patch": 99},
        {"type": "image_url", "image_url": {"url": URL}, "max_dynamic_patch": 99},
        {"type": "image", "image": {"data": URL, "max_dynamic_patch": 99}},
        {"type": "image", "image": URL, "max_dynamic_patch": 99},
        {"type": "image_data", "image_data": {"data": URL, "max_dynamic_patch": 99}},
        {"type": "image_data", "image_data": URL, "max_dynamic_patch": 99},
    ],
)
def test_images_of_a_chat_are_found_in_every_shape_and_written_back_in_one(part) -> None:
    body_read = read_body("chat", chat(part))
    (slot,) = body_read.slots
    assert (slot.source, slot.options["max_dynamic_patch"]) == (URL, 99)
    assert slot.carries
    slot.fill(drawn("QUJD"), {"max_dynamic_patch": 12})
    assert body_read.body["messages"][0]["content"][1] == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,QUJD", "max_dynamic_patch": 12},
    }


@pytest.mark.parametrize("given", [URL, {"url": URL}, [URL], [{"url": URL}, URL]])
def test_image_data_is_found_and_written_back_as_a_list_of_objects(given) -> None:
    body_read = read_body("generate", {"prompt": "x", "image_data": given})
    for slot in body_read.slots:
        slot.fill(drawn("QQ=="), {"max_dynamic_patch": 1})
    count = len(given) if isinstance(given, list) else 1
    image = {"url": "data:image/png;base64,QQ==", "max_dynamic_patch": 1}
    assert body_read.body["image_data"] == [image] * count


def test_anthropic_images_are_found_in_tool_results_too() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "a;b,c", "data": "QQ=="}}
    remote = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [dict(remote)]}
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": [image, result]}]}
    body_read = read_body("messages", body)
    assert [(slot.source, slot.inline, slot.carries) for slot in body_read.slots] == [
        ("QQ==", True, False),
        ("https://example.com/a.png", False, False),
    ]
    for slot in body_read.slots:
        slot.fill(drawn("QUJD"), {})
    written = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    assert body_read.body["messages"][0]["content"][0]["source"] == written
    assert result["content"][0]["source"] == written


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("chat", []),
        ("chat", chat({"type": "video_url", "video_url": {"url": 5}})),
        ("chat", chat({"type": "hologram"})),
        ("chat", chat({"type": ["image_url"]})),
        ("chat", chat("text")),
        ("chat", chat({"type": "text", "text": [1, 2]})),
        ("chat", chat({"type": "image_url", "image_url": {"url": {"a": 1}}})),
        ("chat", {"messages": [{"role": "assistant", "content": [image_part()]}]}),
        ("chat", {"messages": [{"role": "preprocess", "content": []}]}),
        ("chat", {"messages": ["x"]}),
        ("chat", {"messages": {"role": "user"}}),
        ("chat", {"messages": [{"role": "user", "content": {"type": "image_url"}}]}),
        ("chat", {"messages": [], "image_data": [5]}),
        ("completions", {"prompt": [[{"role": "user", "content": [image_part()]}]]}),
        ("completions", {"prompt": [1, 2, 3]}),
        ("completions", {}),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("messages", {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}),
    ],
)
def test_shapes_that_could_carry_something_past_are_refused(kind, body) -> None:
    assert refused(kind, body).message


def test_a_picture_for_responses_is_told_where_pictures_go() -> None:
    content = [{"type": "input_text", "text": "?"}, {"type": "input_image", "image_url": "x"}]
    refusal = refused("responses", {"input": [{"role": "user", "content": content}]})
    assert "images go to /v1/chat/completions" in refusal.message


VIDEO = {"url": "data:video/mp4;base64,QQ=="}


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": VIDEO}, {"type": "video", "video": VIDEO["url"]},
        {"type": "video_url", "video_url": VIDEO["url"]},
        {"type": "video", "source": {"type": "base64", "data": "QQ=="}},
    ],
)  # fmt: skip
def test_videos_are_taken_from_chats_alone(role, part) -> None:
    said = [{"role": role, "content": [part]}]
    if role in ("user", "tool") and "source" not in part:
        (slot,) = read_body("chat", {"messages": said}).slots
        assert (slot.shape, slot.source, slot.carries) == ("clip", VIDEO["url"], False)
    else:
        refused("chat", {"messages": said})
    nested = {"type": "tool_result", "tool_use_id": "1", "content": [part]}
    for content in ([part], [nested]) if role in ("user", "assistant") else ():
        for kind in ("messages", "count_tokens"):
            refusal = refused(kind, {"messages": [{"role": role, "content": content}]})
            assert f"part of type {part['type']!r}" in refusal.message
    refused("responses", {"input": said})
    refused("completions", {"prompt": said})


def test_unknown_fields_session_ids_and_nulls_are_left_out() -> None:
    # LMDeploy 0.18 answers `"n": null` of a completion with a traceback and 500.
    body = chat(session_id=7, migration_request={"a": 1}, with_cache=True, images=[1], n=None)
    assert read_body("chat", {**body, "seed": 3}).body == chat(seed=3)


def test_processor_keywords_are_dropped_and_said() -> None:
    keywords = {"mm_processor_kwargs": {"image": {"max_pixels": 10**9}}}
    body_read = read_body("chat", chat(**keywords, media_io_kwargs={"video": {}}))
    assert body_read.body == chat()
    assert body_read.lowered == ["media_io_kwargs=set->none", "mm_processor_kwargs=set->none"]


def test_tools_of_the_responses_api_may_be_called_image_and_prompts_count_as_copies() -> None:
    body = {"input": "draw", "tools": [{"type": "image_generation"}]}
    assert read_body("responses", body).body == body
    assert read_body("completions", {"prompt": ["a", "b", "c"], "n": 2}).copies == 6


def test_what_an_earlier_answer_holds_beside_text_is_left_out_and_said() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "a"},
        {"type": "reasoning\n", "reasoning": "so"}, {"type": "text", "text": "b"},
        {"type": "thinking", "thinking": "hm"},
    ]  # fmt: skip
    body = {"messages": [{"role": "assistant", "content": parts}, *chat()["messages"]]}
    body_read = read_body("chat", body)
    texts = [{"type": "text", "text": text} for text in "ab"]
    assert body_read.body["messages"][0]["content"] == texts
    assert body_read.lowered == ["messages=thinking->none", "messages=reasoning?->none"]
    user = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
    assert read_body("chat", {"messages": [user]}).body["messages"][0]["content"] == texts[:1]


def _routes_of(role: str, kind: str) -> list[tuple[Any, Any, str]]:
    """Each route's request with a part of this type, and the types that its refusal names."""
    part: dict[str, Any] = {"type": kind, "file": "x"}
    message = {"role": role, "content": [{"type": "text", "text": "a"}, part]}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [part]}
    within = {"role": "user", "content": [result]}
    blocks = "text, image and tool_result are taken"
    return [
        ("chat", {"messages": [message]}, "text, image_url and video_url are taken"),
        ("responses", {"input": [message]}, "text is taken"),
        *((kind, {"messages": [message]}, blocks) for kind in ("messages", "count_tokens")),
        *((kind, {"messages": [within]}, blocks) for kind in ("messages", "count_tokens")),
        ("messages", {"system": [part], "messages": []}, "text is taken"),
    ]


@pytest.mark.parametrize("kind", ["document", "file", "input_audio", "hologram"])
def test_a_part_that_nobody_would_read_is_refused_on_every_route(kind: str) -> None:
    for role in ("user", "system"):
        for route, body, taken in _routes_of(role, kind):
            assert f"holds a part of unknown type {kind!r}: {taken}" in refused(route, body).message
    message = {"role": "tool", "content": [{"type": kind}]}
    assert "video_url are taken" in refused("chat", {"messages": [message]}).message
    items = "message, function_call, function_call_output are taken"
    assert items in refused("responses", {"input": [{"type": kind}]}).message
    output = {"type": "function_call_output", "call_id": "1", "output": [{"type": kind}]}
    assert "text is taken" in refused("responses", {"input": [output]}).message


@pytest.mark.parametrize("kind", ["server_tool_use", "hologram"])
def test_an_earlier_answers_unknown_part_is_left_out_on_every_route(kind: str) -> None:
    for route, body, _ in _routes_of("assistant", kind)[:4]:
        field = "input" if route == "responses" else "messages"
        body_read = read_body(route, deepcopy(body))
        (message,) = body_read.body[field]
        assert [part["type"] for part in message["content"]] == ["text"]
        assert body_read.lowered == [f"{field}={kind}->none"]
    kept = [{"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "id": "1", "name": "f"}]
    body = {"messages": [{"role": "assistant", "content": list(kept)}]}
    assert read_body("messages", body).body["messages"][0]["content"] == kept
    assert read_body("messages", body).lowered == []
