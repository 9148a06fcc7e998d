from __future__ import annotations

import unicodedata

import msgspec
import pytest

from turbofit.gateway.limits.gate import UNSTATED
from turbofit.gateway.limits.ranges import most_tokens

TEXT = "What is this?"


def most(kind: str, text: str = TEXT, *, images: int = 0, **fields: object) -> int:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    raw = msgspec.json.encode(body)
    return most_tokens(kind, body, raw, len(raw), images)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("chat", "max_tokens"),
        ("chat", "max_completion_tokens"),
        ("completions", "max_tokens"),
        ("generate", "max_tokens"),
        ("messages", "max_tokens"),
        ("responses", "max_output_tokens"),
    ],
)
def test_an_answer_counts_where_the_route_s_name_states_it(kind: str, name: str) -> None:
    short = most(kind, **{name: 100})
    assert most(kind, **{name: 300}) - short == 200
    assert most(kind, images=256, **{name: 100}) - short == 256
    assert most(kind, TEXT + "x" * 50, **{name: 100}) - short == 50
    assert most(kind) == most(kind, answer_tokens=1) == UNSTATED


def test_of_two_lengths_the_longer_counts() -> None:
    assert most("chat", max_tokens=9, max_completion_tokens=90) > most("chat", max_tokens=90)


def test_tools_count_twice() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = most("chat", max_tokens=1, tools=tools) - most("chat", max_tokens=1)
    assert with_tools >= 2 * len(msgspec.json.encode(tools))


@pytest.mark.parametrize("text", ["\u4e66\u751f", "a\u0301\u00e9", "\u0958" * 40, "\U0001d160" * 9])
def test_a_token_of_a_normalised_text_has_a_byte_at_least(text: str) -> None:
    room = most("chat", text, max_tokens=1) - most("chat", "", max_tokens=1)
    assert room >= len(unicodedata.normalize("NFC", text).encode())
