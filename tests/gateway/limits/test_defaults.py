"""Defaults for all clients: where each goes, and what a client says first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.gateway import ask, chat, gateway
from turbofit.cli.options.field_options import filled
from turbofit.core.errors import UsageError
from turbofit.gateway.config import GatewayOptions
from turbofit.gateway.limits.defaults import Defaults

QUIET = {"enable_thinking": False}


SAMPLING = {"temperature": 0.2, "top_k": 20, "max_tokens": 64}


DEFAULTS = Defaults(template=QUIET, sampling=SAMPLING)


def laid(kind: str, defaults: Defaults = DEFAULTS, **body: Any) -> dict[str, Any]:
    defaults.complete(kind, body)
    return body


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        ("chat", {**SAMPLING, "chat_template_kwargs": QUIET}), ("completions", SAMPLING),
        ("generate", SAMPLING), ("messages", SAMPLING), ("count_tokens", {}),
        ("responses", {"temperature": 0.2, "top_k": 20, "max_output_tokens": 64}),
    ],
)  # fmt: skip
def test_each_route_gets_what_its_request_model_has(kind: str, added: dict[str, Any]) -> None:
    assert laid(kind) == added


def test_what_a_client_says_stays_and_null_says_nothing() -> None:
    given = {"temperature": 0, "max_completion_tokens": 9, "chat_template_kwargs": {"tone": "dry"}}
    assert laid("chat", **given, top_k=None) == {
        **given, "top_k": 20, "chat_template_kwargs": {**QUIET, "tone": "dry"},
    }  # fmt: skip
    for own in ({"enable_thinking": True}, "x"):
        assert laid("chat", chat_template_kwargs=own)["chat_template_kwargs"] == own
    # LMDeploy lets the argument win over ``enable_thinking`` beside it.
    assert laid("chat", enable_thinking=True)["chat_template_kwargs"] == {}


def test_a_value_beyond_a_route_s_range_is_not_laid_there() -> None:
    warm = {"temperature": 1.5}
    assert laid("chat", Defaults(sampling=warm)) == warm
    assert laid("messages", Defaults(sampling=warm)) == {}


def test_limits_and_the_engine_see_them() -> None:
    app, upstream = gateway(default_chat_template_kwargs=QUIET, default_sampling=SAMPLING)
    assert ask(app, body=chat()).status == 200
    assert upstream.bodies == [{**chat(), **SAMPLING, "chat_template_kwargs": QUIET}]
    app, _ = gateway(default_sampling={"max_tokens": 1 << 20})
    assert "max_tokens=1048576->" in ask(app, body=chat()).headers["x-turbofit-limited"]


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("sampling", '{"temperature": 3}', "temperature is 3.0, it must be at least 0 and at most"),
        ("sampling", '{"temperature": 0.001}', "temperature=0.001->0.01"),
        ("sampling", '{"max_tokens": 0}', "max_tokens is 0, it must be at least 1"),
        ("sampling", '{"temprature": 1}', "--default-sampling has no 'temprature'"),
        ("sampling", "[1]", "is no JSON object"),
        ("chat_template_kwargs", "enable_thinking=false", "is no JSON object"),
        ("chat_template_kwargs", '{"chat_template": "x"}', "may not set 'chat_template'"),
        ("chat_template_kwargs", json.dumps(dict.fromkeys("a" * n for n in range(65))), "65"),
    ],
)
def test_wrong_ones_are_refused_by_the_option_s_name(option: str, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        filled(GatewayOptions, {f"default_{option}": text})
    assert words in caught.value.message
    assert f"--default-{option.replace('_', '-')}" in caught.value.message
