from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.batch_jobs.standin import StandIn, request
from tests.support.processes import free_port
from turbofit.batch_jobs import sender as sending
from turbofit.batch_jobs.output_file import BatchItem, BatchLine, ItemError
from turbofit.batch_jobs.sender import Sender
from turbofit.core.errors import UnservedError, UsageError
from turbofit.core.png import png
from turbofit.measure.load.prompt import user_message


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch) -> None:
    monkeypatch.setattr(sending, "_PAUSE", 0.001)
    monkeypatch.setattr(sending, "_LONGEST_PAUSE", 0.01)


def line(url: str, text: str, **options: Any) -> BatchLine:
    return asked(url, item(request("a", text)["body"]), **options)[0]


def asked(url: str, one: BatchItem, **options: Any) -> tuple[BatchLine, int]:
    """The line of an item, and how many requests the server lowered."""

    async def ask() -> tuple[BatchLine, int]:
        given = {"timeout": 60.0, "patience": 60.0, "key": None, **options}
        async with Sender(url, given.pop("key"), **given) as sender:
            found = await sender.line(one, lambda item: msgspec.json.encode(item.body))
            assert found.error or not sender.waits
            return found, sender.lowered

    return asyncio.run(ask())


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as server:
        yield server


def test_an_answer_is_kept_as_it_came_in_one_line(server) -> None:
    found = line(server.url + "/v1/", "hello")
    assert (found.id, found.custom_id, found.error) == ("batch_req_7-00000001", "a", None)
    assert (found.response["status_code"], found.response["request_id"]) == (200, "r-1")
    body = msgspec.json.decode(bytes(found.response["body"]))
    assert body["choices"][0]["message"]["content"] == "hello"
    raw = msgspec.json.encode(line(server.url, "pretty"))
    assert b"\n" not in raw
    assert msgspec.json.decode(raw)["response"]["body"] == {"a": "b\n c"}


def test_what_is_no_request_is_the_items_failure() -> None:
    item = BatchItem(number=1, digest=1, url="/v1/[x:y//", body={})
    assert asked("http://[", item)[0].error["code"] == "bad_url"
    fault = ItemError("image_missing", "a.png is not there")
    found, _ = asked("http://127.0.0.1:9", BatchItem(number=1, digest=1, fault=fault))
    assert found.response is None
    assert found.error == {"code": "image_missing", "message": "a.png is not there"}


@pytest.mark.parametrize("text", ["503,429,502,504,ok", "reset,reset,ok", "500,503,ok"])
def test_what_passes_is_waited_out(text, server) -> None:
    assert line(server.url, text).error is None
    assert server.seen[text] == text.count(",") + 1


@pytest.mark.parametrize(
    ("text", "options", "times", "status", "code"),
    [
        ("400", {}, 1, 400, "refused"),
        ("500", {}, 3, 500, "refused"),
        ("garbage", {}, 1, 200, "bad_answer"),
        ("nearly", {}, 1, 200, "bad_answer"),
        ("reset", {}, 8, None, "connection_lost"),
        ("hold", {"timeout": 0.05}, 3, None, "connection_lost"),
    ],
)
def test_what_stays_is_the_items_failure(text, options, times, status, code, server) -> None:
    found = line(server.url, text, **options)
    assert (server.seen[text], found.error["code"]) == (times, code)
    assert (found.response and found.response["status_code"]) == status
    assert not options or found.error["message"] == "3 times: no answer in time"


def test_a_server_that_is_ours_is_not_given_up_and_lowered_requests_are_counted(server) -> None:
    text = ",".join(["reset"] * 12 + ["limited"])
    found, lowered = asked(server.url, item(request("a", text)["body"]), patience=None)
    assert (found.error, lowered, server.seen[text]) == (None, 1, 13)


def model(url: str, key: str | None = None) -> str:
    async def ask() -> str:
        async with Sender(url, key, timeout=60, patience=0.05) as sender:
            return await sender.model()

    return asyncio.run(ask())


def test_the_first_model_is_asked_for_and_a_wrong_key_ends_the_batch() -> None:
    with StandIn(key="k") as server:
        assert model(server.url, "k") == "m"
        assert line(server.url, "x", key="k").error is None
        for error, words, ask in (
            (UsageError, "does not know the key", lambda: line(server.url, "x")),
            (UsageError, "does not know the key", lambda: model(server.url)),
            (UnservedError, "answers 404 and", lambda: model(server.url + "/elsewhere", "k")),
            (UsageError, "is no address", lambda: model("http://[")),
            (UnservedError, "no connection", lambda: model(f"http://127.0.0.1:{free_port()}")),
        ):
            with pytest.raises(error, match=words):
                ask()


def sent_for(one, *, replace: bool = False, base: object = "", max_tokens: int | None = None):
    options = {"replace": replace, "base": str(base), "max_tokens": max_tokens}
    return sending.request_body(one, "served", **options)


PNG = png(64, 48)


def body(*urls: str):
    return {"messages": [user_message("?", urls)]}


def urls(found):
    return [one["image_url"]["url"] for one in found["messages"][0]["content"][:-1]]


def item(body: dict[str, Any]) -> BatchItem:
    return BatchItem(number=7, digest=1, custom_id="a", body=body)


def test_model_and_answer_length_are_filled_in() -> None:
    seven = {"max_tokens": 7}
    for body, options, sent in (
        ({"model": "mine", "x": 100.0}, {}, {}),
        ({"x": 1}, {}, {"model": "served"}),
        ({"model": "mine"}, {"replace": True}, {"model": "served"}),
        ({"model": "a"}, seven, seven),
        ({"model": "a", "max_tokens": 9}, seven, {}),
        ({"model": "a", "max_completion_tokens": 9}, seven, {}),
    ):
        assert json.loads(sent_for(item(body), **options)) == {**body, **sent}


def test_images_are_read_when_it_is_sent(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    row = item(body("a.png"))
    assert urls(json.loads(sent_for(row, base=tmp_path)))[0].startswith("data:image/png")
    assert row.body == body("a.png"), "an entry stays small"
    for raw, words in (
        (body("none.png"), "is no file"),
        ({"stream": True}, "no streams"),
        ({"prompt": "\udcff"}, "cannot be sent"),
        ({"messages": 1}, "cannot be sent"),
        ({"messages": [1]}, "cannot be sent"),
    ):
        with pytest.raises(ItemError, match=words):
            sent_for(item(raw), base=tmp_path)


def failure(found, base: object = "") -> ItemError:
    with pytest.raises(ItemError) as caught:
        sent_for(item(found), base=base)
    return caught.value


def test_files_are_put_inline_and_addresses_stay(tmp_path) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    inline = "data:image/png;base64," + base64.b64encode(PNG).decode()
    found = body("a b.png", f"file://{tmp_path}/a%20b.png", inline, "https://x/y.png")
    found["messages"][0]["content"][0]["image_url"] = "a b.png"  # a bare string is a URL too
    sent = json.loads(sent_for(item(found), base=tmp_path))
    assert urls(sent) == [inline, inline, inline, "https://x/y.png"]
    # Other bodies have none.
    for odd in ({}, {"messages": [{"content": "x"}, {"content": [{}]}, {"role": "assistant"}]}):
        assert json.loads(sent_for(item(odd))) == {**odd, "model": "served"}


def test_each_broken_image_has_its_code(tmp_path, monkeypatch) -> None:
    (tmp_path / "cut.png").write_bytes(PNG[:-20])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "head.png").write_bytes(PNG[:12])
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    codes = {
        "none.png": "image_missing", "a\0b.png": "image_missing", "cut.png/x": "image_missing",
        "pipe.png": "image_missing", "file://photos[1]/a.png": "image_unreadable",
        "folder.png": "image_missing", "cut.png": "truncated_image",
        "text.png": "unknown_image_type", "head.png": "broken_image",
        "data:image/png;base64,%%%": "bad_image_base64", "data:image/png,x": "bad_image_url",
    }  # fmt: skip
    assert {url: failure(body(url), tmp_path).code for url in codes} == codes
    # What is too big is not read.
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(sending, "LARGEST_IMAGE", len(PNG) - 1)
    for url in ("a.png", "data:image/png;base64," + base64.b64encode(PNG).decode()):
        assert failure(body(url), tmp_path).code == "image_too_big"
