"""Bodies made ready for an engine: JSON, remote and resized images, and their memory."""

from __future__ import annotations

import asyncio
import threading
from io import BytesIO
from typing import Any

import pytest
from msgspec.structs import replace
from PIL import Image

from tests.gateway.http.test_app import ANTHROPIC
from tests.support.gateway import (
    CHAT,
    Answer,
    Recorder,
    anthropic,
    ask,
    call,
    chat,
    data_url,
    gateway,
    image_part,
    picture,
    plan_for,
)
from tests.support.waiting import auntil
from turbofit.gateway.http import body as body_module
from turbofit.gateway.http.prepare import Preparation
from turbofit.gateway.media.fetch import FetchPermits, MediaFetcher
from turbofit.gateway.media.pictures import from_base64


@pytest.mark.parametrize(
    ("keywords", "status"),
    [
        ({"body": chat(), "kind": "text/plain"}, 415),
        ({"body": chat(), "kind": "application/json; charset=utf-8"}, 200),
        ({"body": chat(), "headers": {"content-encoding": "gzip"}}, 415),
        ({"raw": b"{", "method": "POST"}, 400),
        ({"raw": b"", "method": "POST"}, 400),
        ({"raw": b"[" * 100_000, "method": "POST"}, 400),
        ({"raw": b'{"a":NaN}', "method": "POST"}, 400),
        ({"raw": b'{"seed":-1e999}', "method": "POST"}, 400),
        ({"raw": b'\xef\xbb\xbf{"model":"m","messages":"x"}', "method": "POST"}, 200),
        ({"raw": b"\xef\xbb\xbf\xef\xbb\xbf{}", "method": "POST"}, 400),
        ({"raw": b'{"messages":"\\ud800"}', "method": "POST"}, 400),
        ({"raw": b'{"messages":"\xff"}', "method": "POST"}, 400),
        ({"raw": b"{}", "headers": {"content-length": "99999999999"}}, 413),
        ({"raw": b" " * (20 << 20), "method": "POST"}, 413),
        ({"body": chat(seed=10**30)}, 200),
        ({"body": {"model": "m", "messages": "x" * (4 << 20)}}, 413),
    ],
)
def test_bodies(keywords, status) -> None:
    app, _ = gateway()
    assert ask(app, **keywords).status == status


def test_token_counts_include_images_without_sending_them() -> None:
    app, upstream = gateway(recorder=Recorder(lambda *_: Answer(b'{"input_tokens":7}')))
    path, messages = "/v1/messages/count_tokens", ANTHROPIC["messages"]
    assert ask(app, path, {"messages": messages}).json == {"input_tokens": 7 + 13 * 256}
    assert upstream.bodies[0]["messages"][0]["content"] == [{"type": "text", "text": ""}]
    # Images make no room for text.
    body = anthropic(picture(64, 64) + bytes(1 << 20))
    text = {"type": "text", "text": "x" * (app.bounds.beside_images + 1)}
    body["messages"][0]["content"].append(text)
    reply = ask(app, path, {"messages": body["messages"]})
    assert (reply.status, len(upstream.seen)) == (413, 1)
    assert "context of 32768 tokens" in reply.json["error"]["message"]


@pytest.mark.parametrize(("side", "beside"), [(40, False), (400, True)])
def test_no_step_over_a_large_picture_runs_in_the_loop(side, beside, monkeypatch) -> None:
    """JSON and base64 of megabytes take milliseconds, for each of a hundred that come at once."""
    in_loop = dict.fromkeys(("whole", "__init__", "hold", "finish"), True)

    def note(place: Any, name: str) -> None:
        act = getattr(place, name)

        def noted(*arguments: Any) -> Any:
            in_loop[name] = threading.current_thread() is threading.main_thread()
            return act(*arguments)

        monkeypatch.setattr(place, name, noted)

    note(body_module._Arrival, "whole")
    for name in ("__init__", "hold", "finish"):
        note(Preparation, name)
    file = BytesIO()
    Image.effect_noise((side, 2 * side), 90).save(file, "PNG")
    part = {"type": "image_url", "image_url": {"url": data_url(file.getvalue())}}
    app, recorder = gateway(engines=2)
    assert ask(app, body=chat(part)).status == 200
    assert recorder.bodies[0]["messages"][0]["content"][1]["image_url"]["url"].startswith("data:")
    assert set(in_loop.values()) == {not beside}


class Fetched(MediaFetcher):
    """Every address has the same image of a MiB; they come one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.files, self._permits = 0, FetchPermits(2)

    async def _bytes(self, url, most_bytes, names):
        self.files += 1
        await asyncio.sleep(0)  # as a network does; else Python 3.12 fetches all in one step
        return picture(64, 64) + bytes(1 << 20)


def remote(name: object = "a") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"https://here.org/{name}.png"}}


async def waiting(*words: Any, **keywords: Any):
    """A gateway whose engine holds the first request until the event is set."""
    permit = asyncio.Event()

    async def slow(*_):
        if len(upstream.seen) == 1:
            await permit.wait()
        return Answer(b"{}")

    app, upstream = gateway(fetcher=Fetched(), recorder=Recorder(slow), **keywords)
    pending = asyncio.ensure_future(call(app, *words))
    await auntil(lambda: upstream.seen, "the request at the engine")
    beside_body = app._bodies.in_memory - len(upstream.seen[0][3])
    return app, permit, pending, beside_body


@pytest.mark.parametrize("same", [True, False])
def test_remote_images_are_held_to_the_bytes_of_a_body_as_they_come(same) -> None:
    """64 files of 32 MiB were 2 GiB before the body was found too large."""
    fetcher = Fetched()
    app, upstream = gateway(fetcher=fetcher)
    most = app.bounds.limits.bytes_per_body >> 20
    parts = [remote("a" if same else number) for number in range(26 if same else 2 * most)]
    reply = ask(app, body=chat(*parts))
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_big")
    assert fetcher.files == 1 if same else most // 2 < fetcher.files < 2 * most
    assert (upstream.seen, app._bodies.in_memory) == ([], 0)


async def test_remote_images_take_room_of_bodies_until_they_were_sent() -> None:
    app, permit, pending, beside_body = await waiting(CHAT, chat(remote(), remote()))
    app._bodies.count(app._bodies._room - app._bodies.in_memory - 1024)
    other = await call(app, body=chat(remote()), headers={"x-api-key": "other"})
    permit.set()
    await pending
    assert abs(beside_body) < 1024
    assert (other.status, len(app._upstream.seen)) == (429, 1)


async def test_images_past_the_plan_are_resized_and_take_the_room_of_their_new_bytes() -> None:
    """They can carry no limit, and without an overlay the default is no plan's."""
    app, permit, pending, beside_body = await waiting(
        "/v1/messages", anthropic(picture(448, 5376)), plan=plan_for(limit=4), overlay=False
    )
    permit.set()
    assert (await pending).headers["x-turbofit-limited"] == "image=448x5376->448x1792"
    (image,) = app._upstream.bodies[0]["messages"][0]["content"]
    assert from_base64(image["source"]["data"], 1 << 20).size == (448, 1792)
    assert beside_body >= 0
    assert app._bodies.in_memory == 0


def test_images_beyond_the_memory_of_the_host_are_refused() -> None:
    app, _ = gateway()
    app.bounds = replace(app.bounds, host_bytes=1)
    reply = ask(app, body=chat(image_part(64, 64)))
    assert (reply.status, reply.json["error"]["code"]) == (400, "images_over_limit")


def test_of_several_images_the_refused_one_is_named_by_its_place() -> None:
    app, _ = gateway()
    broken = {"type": "image_url", "image_url": {"url": data_url(picture(64, 64)[:-9])}}
    for parts, place in (
        ((image_part(64, 64), broken), "image 2 of 2: "),
        ((broken,), "an image "),
    ):
        error = ask(app, body=chat(*parts)).json["error"]
        assert (error["code"], error["message"].startswith(place)) == ("truncated_image", True)
