"""Loads of bench/gpu: warm-up, turns, what is told to wait, and what was not answered."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.gpu.load import Load, drive
from turbofit import api

PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")
#: What a server does with its nth request: a status, and the header that says when to try again.
Answer = Callable[[int], tuple[int, dict[str, str]]]


@contextmanager
def server(answer: Answer, asked: list[tuple[int, Any, Any]]) -> Iterator[str]:
    """A server; each request goes to ``asked`` as (port, key, body)."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((self.server.server_address[1], self.headers["Authorization"], body))
                status, headers = answer(len(asked))
            if status == 0:
                self.close_connection = True
                return
            raw = json.dumps({"usage": {"completion_tokens": body["max_tokens"]}}).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{made.server_port}"
        finally:
            made.shutdown()


def test_a_load_counts_answers_and_tokens_and_says_what_was_not_answered() -> None:
    asked: list[Any] = []
    with server(lambda n: (503 if n == 8 else 200, {}), asked) as url:
        load = Load(12, 3, 600.0, tokens=5, ways=("direct",), warm=4)
        found = drive(PLAN, "m", {"direct": (url, "key")}, load)["direct"]
    assert len(asked) == 16
    assert found["statuses"] == {"200": 11, "503": 1}
    assert (found["answered"], found["unanswered"]) == (11, {"status 503": 1})
    assert found["tokens_per_second"] == pytest.approx(5 * found["requests_per_second"])
    assert len(found["turns"]) == 4
    _, key, body = asked[0]
    assert key == "Bearer key"
    assert body["ignore_eos"] is True
    assert body["messages"][0]["content"][1]["type"] == "image_url"


def test_the_two_ways_are_warmed_up_and_take_turns() -> None:
    asked: list[Any] = []
    ways = {}
    with server(lambda _: (200, {}), asked) as one, server(lambda _: (200, {}), asked) as other:
        ways = {"direct": (one, "key"), "gateway": (other, None)}
        found = drive(PLAN, "m", ways, Load(8, 2, 600.0, warm=2))
        ports = {int(one.rsplit(":", 1)[1]): "d", int(other.rsplit(":", 1)[1]): "g"}
    order = "".join(ports[port] for port, *_ in asked)
    assert order == "ddgg" + "dd" + "gggg" + "dddd" + "gggg" + "dd"
    assert {name: part["answered"] for name, part in found.items()} == {"direct": 8, "gateway": 8}


def test_who_is_told_when_to_try_again_does() -> None:
    asked: list[Any] = []
    busy = {"Retry-After": "0"}
    with server(lambda n: (429, busy) if n in (2, 3, 5) else (200, {}), asked) as url:
        load = Load(4, 2, 600.0, ways=("gateway",), warm=0)
        found = drive(PLAN, "m", {"gateway": (url, None)}, load)["gateway"]
    assert (found["answered"], found["unanswered"]) == (4, {})
    assert found["refused"] == {"429": 3}
    # It is not waited for what comes after the end: that request is told as it is.
    with server(lambda n: (429, {"Retry-After": "10000"}), []) as url:
        found = drive(PLAN, "m", {"gateway": (url, None)}, load)["gateway"]
    assert found["unanswered"] == {"status 429": 4}


def test_a_server_that_is_gone_is_left_alone_and_the_rest_is_not_asked() -> None:
    with server(lambda _: (0, {}), []) as url:
        load = Load(100, 2, 600.0, worst=True, ways=("direct",), warm=0)
        broken = drive(PLAN, "m", {"direct": (url, None)}, load)["direct"]
        assert broken["answered"] == 0
        assert 3 <= broken["statuses"]["0"] <= 4
        assert sum(broken["unanswered"].values()) == 100
        assert broken["unanswered"]["not asked"] >= 96
        none = drive(PLAN, "m", {"direct": (url, None)}, Load(100, 2, 0.0, ways=("direct",)))
        assert (none["direct"]["statuses"], none["direct"]["unanswered"]) == (
            {},
            {"not asked": 100},
        )


def test_a_worst_load_has_the_plans_worst_image() -> None:
    asked: list[Any] = []
    with server(lambda _: (200, {}), asked) as url:
        load = Load(1, 1, 600.0, worst=True, ways=("direct",), warm=0, turns=1)
        drive(PLAN, "m", {"direct": (url, None)}, load)
    image = asked[0][2]["messages"][0]["content"][1]["image_url"]
    assert image["max_dynamic_patch"]
