"""The page at the address: what it shows, to whom; and the lines that ask a server."""

from __future__ import annotations

import ast
import json
import re
import shlex

import pytest

from tests.support.gateway import PATCHES, TILES, call, gateway, plan_for
from turbofit.gateway.http.welcome import client_lines, limits_in_words, welcome_page
from turbofit.gateway.limits.request_limits import bounds_of


def test_the_shell_line_is_one_request() -> None:
    shell, _ = client_lines("http://127.0.0.1:1", "o'b/m", key=False)
    curl, url, _, header, _, body = shlex.split(shell)
    assert (curl, url) == ("curl", "http://127.0.0.1:1/v1/chat/completions")
    assert header == "Content-Type: application/json"
    assert json.loads(body)["model"] == "o'b/m"


def test_the_python_line_parses_and_a_key_is_read_from_the_environment() -> None:
    shell, python = client_lines("http://h:1", "m", key=True)
    call = ast.parse(python, mode="eval")
    assert "http://h:1/v1" in ast.dump(call)
    assert "API_KEY" in ast.dump(call)
    assert "Bearer $API_KEY" in shell


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/"])
async def test_it_shows_model_limits_example_and_routes(path: str) -> None:
    app, upstream = gateway(names={"org/<b>m": "org/m", "m": "org/m"})
    reply = await call(app, path, method="GET", headers={"host": "box:8000"})
    text = reply.body.decode()
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "turbofit serves org/&lt;b&gt;m</h1>" in text
    assert "turbofit chat http://box:8000</pre>" in text
    assert "2 images of 12 tiles, or 26 smaller ones; a larger image is made smaller" in text
    assert '<a href="/metrics">/metrics</a>' in text
    assert not re.search("<script|<b>", text)
    assert upstream.bodies == []


async def test_who_shows_no_key_learns_only_where_to_put_it() -> None:
    app, _ = gateway(names={"secret-model": "m"}, api_keys=("k",))
    reply = await call(app, "/", method="GET")
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert 'refused_total{reason="unauthorized"} 1' in app.metrics.text({})
    assert b"Authorization: Bearer KEY" in reply.body
    assert b"secret-model" not in reply.body
    assert b"/v1/" not in reply.body
    reply = await call(app, "/", method="GET", headers={"authorization": "Bearer k"})
    assert reply.status == 200
    assert b"Bearer $API_KEY" in reply.body


async def test_other_methods_are_as_before() -> None:
    app, _ = gateway()
    assert (await call(app, "/", {})).status == 404


def test_a_host_that_is_none_is_not_shown() -> None:
    page = welcome_page("http", "a<script>", {}, key=False, notice="PRETEND <GPUs>").decode()
    assert "script" not in page
    assert "http://HOST" in page
    assert "PRETEND &lt;GPUs&gt;" in page


def test_limits_are_those_of_the_plan() -> None:
    tiles, patches = (limits_in_words(bounds_of(plan_for(rule))) for rule in (TILES, PATCHES))
    assert "tokens: prompt, images and answer together" in tiles[0]
    assert tiles[1].startswith("2 images of 12 tiles")
    assert patches[1].startswith("2 images of 12,845,056 pixels")
    assert tiles[2] == "4 answers at once (n)"
