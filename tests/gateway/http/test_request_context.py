"""A request's id, its record, and who its client is."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.gateway import (
    ask,
    chat,
    gateway,
    image_part,
)
from turbofit.gateway.http.request_context import RequestContext, sent_headers


def test_request_ids_are_kept_where_harmless() -> None:
    app, upstream = gateway()
    reply = ask(app, body=chat(), headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == upstream.seen[-1][4]["X-Request-Id"] == "abc-1"
    other = ask(app, body=chat(), headers={"x-request-id": "a\r\nb"}).headers["x-request-id"]
    assert len(other) == 32


def test_what_is_lowered_is_said_and_the_log_holds_no_prompt_and_no_image(caplog) -> None:
    caplog.set_level("DEBUG", logger="turbofit")
    records = []
    app, upstream = gateway(log=records.append, api_key=("secret-key",))
    body = chat(image_part(640, 480, detail="high"), max_tokens=9)
    body["messages"][0]["content"][0]["text"] = "a very private question"
    reply = ask(app, body=body, headers={"authorization": "Bearer secret-key"})
    assert (reply.status, reply.headers["x-turbofit-limited"]) == (200, "detail=high->12")
    (sent,) = upstream.bodies
    image = sent["messages"][0]["content"][1]["image_url"]
    assert (set(image), image["max_dynamic_patch"]) == ({"url", "max_dynamic_patch"}, 12)
    assert sent["max_tokens"] == 9
    (record,) = records
    text = json.dumps(record) + caplog.text
    assert not re.search("private|secret|base64", text)
    assert (record["images"], record["units"]) == (1, 13)
    assert (record["limited"], record["status"]) == (["detail=high->12"], 200)


@pytest.mark.parametrize(
    ("given", "sent"),
    [(b"2023-06-01", "2023-06-01"), (b"1\r\ncookie: c", None), (b"9" * 50, "9" * 40), (b"", None)],
)
def test_of_a_clients_headers_an_engine_gets_the_version_alone(given, sent) -> None:
    headers = [(b"anthropic-version", given), (b"cookie", b"c"), (b"x-request-id", b"a")]
    request = RequestContext({"method": "POST", "headers": headers})
    version = {} if sent is None else {"Anthropic-Version": sent}
    fixed = {"X-Request-Id": "a", "Content-Type": "application/json"}
    assert sent_headers(request) == {**fixed, **version}
