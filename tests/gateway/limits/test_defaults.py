"""Defaults of a server, where the client does not give a value and the route has the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.gateway import CHAT, ask, chat, gateway
from turbofit.cli.options.common_options import filled
from turbofit.cli.options.launch_options import GatewayOptions
from turbofit.core.errors import UsageError
from turbofit.gateway.http.prepare import Preparation
from turbofit.gateway.limits.defaults import Defaults

QUIET = {"enable_thinking": False}
DEFAULTS = Defaults(template=QUIET, sampling={"temperature": 0.2, "top_k": 20, "max_tokens": 64})
MESSAGES = [{"role": "user", "content": "x"}]


def laid(kind: str, **body: Any) -> dict[str, Any]:
    DEFAULTS.complete(kind, body)
    return body


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        (
            "chat",
            {
                "temperature": 0.2,
                "top_k": 20,
                "max_tokens": 64,
                "chat_template_kwargs": QUIET,
            },
        ),
        ("completions", {"temperature": 0.2, "top_k": 20, "max_tokens": 64}),
        ("generate", {"temperature": 0.2, "top_k": 20, "max_tokens": 64}),
        ("messages", {"temperature": 0.2, "top_k": 20, "max_tokens": 64}),
        ("responses", {"temperature": 0.2, "top_k": 20, "max_output_tokens": 64}),
        ("count_tokens", {}),
    ],
)
def test_each_route_gets_what_its_request_model_has(kind: str, added: dict[str, Any]) -> None:
    assert laid(kind) == added


def test_what_a_client_says_stays_and_null_says_nothing() -> None:
    given = {"temperature": 0, "max_completion_tokens": 9, "chat_template_kwargs": {"tone": "dry"}}
    assert laid("chat", **given, top_k=None) == {
        **given, "top_k": 20, "chat_template_kwargs": {**QUIET, "tone": "dry"},
    }  # fmt: skip
    own = {"enable_thinking": True}
    assert laid("chat", chat_template_kwargs=own)["chat_template_kwargs"] == own
    assert laid("chat", chat_template_kwargs="x")["chat_template_kwargs"] == "x"


def test_a_client_s_own_field_stands_above_the_argument_that_it_means() -> None:
    """LMDeploy lets the argument win over ``enable_thinking`` beside it."""
    assert laid("chat", enable_thinking=True)["chat_template_kwargs"] == {}


def test_a_value_beyond_a_route_s_range_is_not_laid_there() -> None:
    warm = Defaults(sampling={"temperature": 1.5})
    for kind, added in (("chat", {"temperature": 1.5}), ("messages", {})):
        body: dict[str, Any] = {}
        warm.complete(kind, body)
        assert body == added


def test_limits_and_the_engine_see_them() -> None:
    app, upstream = gateway(defaults=DEFAULTS)
    assert ask(app, body=chat()).status == 200
    (body,) = upstream.bodies
    assert body["chat_template_kwargs"] == QUIET
    assert body["temperature"] == 0.2
    # A bound of the answer is what the cache is reserved by.
    bounds = app.bounds
    plain = Preparation(bounds, "chat", json.dumps(chat()).encode())
    under = Preparation(bounds, "chat", json.dumps(chat()).encode(), DEFAULTS)
    assert "max_tokens" not in plain.parsed.body
    assert under.parsed.body["max_tokens"] == 64


def test_a_default_over_the_plan_is_lowered_as_a_client_s() -> None:
    app, _ = gateway(defaults=Defaults(sampling={"max_tokens": 1 << 20}))
    assert "max_tokens=1048576->" in ask(app, path=CHAT, body=chat()).headers["x-turbofit-limited"]


def test_the_page_says_them() -> None:
    app, _ = gateway(defaults=DEFAULTS, names={"m": "m"})
    text = ask(app, path="/", method="GET").body.decode()
    assert "where a request does not say otherwise: temperature 0.2, top_k 20" in text
    assert Defaults().words == []


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("default_sampling", '{"temperature": 3}', "temperature 3: it should be 2.0 or less"),
        ("default_sampling", '{"temprature": 1}', "--default-sampling has no 'temprature'"),
        ("default_sampling", "[1]", "is no JSON object"),
        ("default_chat_template_kwargs", "enable_thinking=false", "is no JSON object"),
        ("default_chat_template_kwargs", '{"chat_template": "x"}', "may not hold 'chat_template'"),
        ("default_chat_template_kwargs", json.dumps({"x": "a" * 20_000}), "20,009 bytes"),
        (
            "default_chat_template_kwargs",
            json.dumps(dict.fromkeys("a" * n for n in range(65))),
            "65",
        ),
        ("default_chat_template_kwargs", r'{"x": ["\ud800"]}', "half a surrogate pair"),
        ("default_chat_template_kwargs", '{"x": NaN}', "NaN"),
        ("default_chat_template_kwargs", '{"x": 1e999}', "Infinity"),
    ],
)
def test_wrong_ones_are_refused_by_the_option_s_name(option: str, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        filled(GatewayOptions, {option: text})
    assert words in caught.value.message
    assert f"--{option.replace('_', '-')}" in caught.value.message


def test_options_are_words_again() -> None:
    given = {"default_sampling": '{"top_p": 0.9}'}
    words = filled(GatewayOptions, given).option_arguments()
    assert words == ["--default-sampling", '{"top_p": 0.9}']
