from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.batch.standin import StandIn, request
from tests.support.processes import free_port
from turbofit.batch import sender as sending
from turbofit.batch.output_file import BatchItem, BatchLine, ItemError
from turbofit.batch.sender import Sender
from turbofit.core.errors import UnservedError, UsageError


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch) -> None:
    monkeypatch.setattr(sending, "_PAUSE", 0.001)
    monkeypatch.setattr(sending, "_LONGEST_PAUSE", 0.01)


def line(url: str, text: str, **options: Any) -> BatchLine:
    raw = msgspec.Raw(msgspec.json.encode(request("a", text)["body"]))
    item = BatchItem(number=7, digest=1, custom_id="a", body=raw)
    return asked(url, item, **options)[0]


def asked(url: str, item: BatchItem, **options: Any) -> tuple[BatchLine, int]:
    """The line of an item, and how many requests the server lowered."""

    async def ask() -> tuple[BatchLine, int]:
        given = {"timeout": 60.0, "patience": 60.0, "key": None, **options}
        async with Sender(url, given.pop("key"), **given) as sender:
            found = await sender.line(item, lambda item: bytes(item.body))
            assert found.error or not sender.waits
            return found, sender.lowered

    return asyncio.run(ask())


def test_an_answer_is_kept_as_it_came() -> None:
    with StandIn() as server:
        found = line(server.url + "/v1/", "hello")
    assert (found.id, found.custom_id, found.error) == ("batch_req_7-00000001", "a", None)
    assert (found.response.status_code, found.response.request_id) == (200, "r-1")
    body = msgspec.json.decode(bytes(found.response.body))
    assert body["choices"][0]["message"]["content"] == "hello"


def test_an_answer_of_several_lines_becomes_one() -> None:
    with StandIn() as server:
        found = line(server.url, "pretty")
    raw = msgspec.json.encode(found)
    assert b"\n" not in raw
    assert msgspec.json.decode(raw)["response"]["body"] == {"a": "b\n c"}


def test_what_is_no_request_is_the_items_failure() -> None:
    item = BatchItem(number=1, digest=1, url="/v1/[x:y//", body=msgspec.Raw(b"{}"))
    assert asked("http://[", item)[0].error.code == "bad_url"
    fault = ItemError("image_missing", "a.png is not there")
    found, _ = asked("http://127.0.0.1:9", BatchItem(number=1, digest=1, fault=fault))
    assert found.response is None
    assert (found.error.code, found.error.message) == ("image_missing", "a.png is not there")


@pytest.mark.parametrize("text", ["503,429,502,504,ok", "reset,reset,ok", "500,ok", "500,503,ok"])
def test_what_passes_is_waited_out(text) -> None:
    with StandIn() as server:
        found = line(server.url, text)
        assert server.seen[text] == text.count(",") + 1
    assert found.error is None


@pytest.mark.parametrize(
    ("text", "times", "status", "code"),
    [
        ("400", 1, 400, "refused"),
        ("404", 1, 404, "refused"),
        ("422", 1, 422, "refused"),
        ("500", 3, 500, "refused"),
        ("garbage", 1, 200, "bad_answer"),
        ("nearly", 1, 200, "bad_answer"),
        ("reset", 8, None, "connection_lost"),
    ],
)
def test_what_stays_is_the_items_failure(text, times, status, code) -> None:
    with StandIn() as server:
        found = line(server.url, text)
        assert server.seen[text] == times
    assert found.error.code == code
    assert (found.response and found.response.status_code) == status


def test_a_server_that_is_ours_is_not_given_up(monkeypatch) -> None:
    text = ",".join(["reset"] * 12 + ["ok"])
    with StandIn() as server:
        assert line(server.url, text, patience=None).error is None
        assert server.seen[text] == 13


def test_an_answer_that_takes_too_long_is_the_items_failure() -> None:
    with StandIn() as server:
        found = line(server.url, "hold", timeout=0.05)
        assert server.seen["hold"] == 3
    assert (found.error.code, found.error.message) == (
        "connection_lost",
        "3 times: no answer in time",
    )


def test_a_lowered_request_is_counted() -> None:
    for text, lowered in (("limited", 1), ("hello", 0)):
        raw = msgspec.Raw(msgspec.json.encode(request("a", text)["body"]))
        with StandIn() as server:
            assert asked(server.url, BatchItem(number=1, digest=1, body=raw))[1] == lowered


def test_patience_has_an_end() -> None:
    with pytest.raises(UnservedError, match=r"has not answered for .*: no connection") as caught:
        line(f"http://127.0.0.1:{free_port()}", "x", patience=0.02)
    assert "give the same command" in caught.value.hint


def test_a_server_that_fails_seldom_is_not_away(monkeypatch) -> None:
    class Times:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    times = Times()
    monkeypatch.setattr(sending, "time", times)

    async def fail(step: float) -> None:
        async with Sender("http://127.0.0.1:9", None, timeout=1, patience=100) as sender:
            for _ in range(20):
                times.now += step
                sender._away("the connection broke")

    asyncio.run(fail(91.0))
    with pytest.raises(UnservedError):
        asyncio.run(fail(60.0))


def test_a_wrong_key_ends_the_batch_and_a_right_one_is_sent() -> None:
    with StandIn(key="k") as server:
        with pytest.raises(UsageError, match="does not know the key"):
            line(server.url, "x")
        assert line(server.url, "x", key="k").error is None


def model(url: str, key: str | None = None) -> str:
    async def ask() -> str:
        async with Sender(url, key, timeout=60, patience=0.05) as sender:
            return await sender.model()

    return asyncio.run(ask())


def test_the_first_model_is_asked_for() -> None:
    with StandIn(key="k") as server:
        assert model(server.url, "k") == "m"
        with pytest.raises(UsageError, match="does not know the key"):
            model(server.url)
        with pytest.raises(UnservedError, match="answers 404 and names no model"):
            model(server.url + "/elsewhere", "k")
    with pytest.raises(UsageError, match="is no address"):
        model("http://[")
    with pytest.raises(UnservedError, match="no connection"):
        model(f"http://127.0.0.1:{free_port()}")
