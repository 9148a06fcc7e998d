"""An ASGI driver, an upstream that records, plans and pictures."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from io import BytesIO
from typing import Any

import msgspec
from PIL import Image

from tests.support.plans import model, plausible_plan
from turbofit.core.images import PatchRule, TileRule
from turbofit.core.messages import FIRST_TOKENS
from turbofit.core.plan import Plan
from turbofit.core.promise import Limits, Promise
from turbofit.gateway.config import GatewayConfig
from turbofit.gateway.http.app import Gateway
from turbofit.gateway.upstream import Died, Unreachable
from turbofit.serving.plan_gateway import bounds_of

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056)
CHAT = "/v1/chat/completions"
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def limits_for(rule, *, limit=None, images=2, n=4, **changes) -> Limits:
    """Limits as the tuner would write them."""
    units = rule.worst_units(limit)
    facts: dict[str, Any] = {
        "vision_unit": rule.unit_name,
        "max_dynamic_patch": None,
        "max_pixels_per_image": None,
        rule.plan_limit_name: limit or rule.checkpoint_limit,
        "images_per_request": images,
        "units_per_image": units,
        "units_per_request": units * images,
        "image_tokens_per_request": rule.unit_tokens(units) * images,
        "n": n,
        "bytes_per_image": 4 << 20,
        "bytes_per_body": images * (6 << 20) + (1 << 20),
    }
    return Limits(**{**facts, **changes})


def promise_for(limits: Limits, context: int = 10**9) -> Promise:
    """A promise with these limits."""
    return Promise(
        context=context, images=limits.images_per_request, image_limit=limits.image_limit,
        requests=1, request_tokens=1, limits=limits,
    )  # fmt: skip


def plan_for(rule=TILES, *, units_per_forward=10**9, **changes) -> Plan:
    """A plan of one engine with these limits."""
    limits = limits_for(rule, **changes)
    return plausible_plan(
        model=model(image_rule=rule), limits=limits, units_per_forward=units_per_forward
    )


def picture(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    """A small file of so many pixels."""
    file = BytesIO()
    Image.new("1" if kind in ("PNG", "BMP") else "RGB", (width, height)).save(file, kind, **options)
    return file.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{b64encode(data).decode()}"


def image_part(width: int = 64, height: int = 64, beside=None, **inside: Any) -> dict[str, Any]:
    url = data_url(picture(width, height))
    return {"type": "image_url", "image_url": {"url": url, **inside}, **(beside or {})}


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "What is this?"}, *parts]
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


def anthropic(*images: bytes, **fields: Any) -> dict[str, Any]:
    """A request of Anthropic's API with these images."""
    source = {"type": "base64", "media_type": "image/png"}
    texts = [b64encode(image).decode() for image in images]
    content = [{"type": "image", "source": {**source, "data": text}} for text in texts]
    return {"max_tokens": 5, "messages": [{"role": "user", "content": content}], **fields}


class _Content:
    def __init__(self, response: Answer) -> None:
        self._answer, self._parts = response, list(response.parts)

    def at_eof(self) -> bool:
        return not self._parts

    async def readany(self) -> bytes:
        if not self._parts:
            return b""
        part = self._parts.pop(0)
        if isinstance(part, float):
            await asyncio.sleep(part)
            return await self.readany()
        if isinstance(part, asyncio.Event):
            await part.wait()
            return await self.readany()
        if isinstance(part, asyncio.Future):
            await part
            raise OSError("reset")
        if isinstance(part, Exception):
            raise part
        return part


class Answer:
    """What the upstream says: bytes, pauses (floats) and exceptions, one after the other.

    At a future it breaks off, once that is done; at an event it waits.
    """

    def __init__(self, *parts: Any, status: int = 200, kind: str = "application/json", **headers):
        self.parts, self.status = parts, status
        self.headers = {"Content-Type": kind, **headers}
        self.closed = False
        self.content = _Content(self)

    def close(self) -> None:
        self.closed = True

    release = close

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class FirstTokensPage(Answer):
    """An engine's page of first tokens; ``lines`` are the names that it tells, b"" its end."""

    def __init__(self) -> None:
        super().__init__(kind="text/plain")
        self.lines: asyncio.Queue[bytes] = asyncio.Queue()
        self.content.readline = self.lines.get  # type: ignore[attr-defined]


def stream(*parts: Any) -> Answer:
    return Answer(*parts, kind="text/event-stream; charset=utf-8")


class Recorder:
    """Stands in for `upstream.Upstream`: remembers every request."""

    def __init__(self, answer=None) -> None:
        self.seen: list[tuple[int, str, str, Any, dict[str, str]]] = []
        self.answer = answer or (lambda *_: Answer(b'{"choices":[]}'))
        self.answers: list[Answer] = []
        self.works, self.probes, self.pages = True, 0, ""
        #: The page on which engines tell first tokens; LMDeploy's own server has none.
        self.tokens_page = Answer(status=404)
        #: Engines where nothing listens, and those whose probes fail.
        self.down: set[int] = set()
        self.failing: set[int] = set()

    async def open(self, engine, method, path, body, headers):
        if engine.index in self.down:
            raise Unreachable("down", ended=True)
        if path == FIRST_TOKENS:
            return self.tokens_page
        self.seen.append((engine.index, method, path, body, headers))
        answer = self.answer(engine, path, body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if isinstance(answer, Exception):
            raise Died(str(answer)) from answer
        self.answers.append(answer)
        return answer

    async def probe(self, engine) -> bool:
        self.probes += 1
        return self.works and engine.index not in self.down | self.failing

    async def page(self, engine, path, seconds) -> str:
        return self.pages

    async def close(self) -> None:
        pass

    @property
    def bodies(self) -> list[Any]:
        return [msgspec.json.decode(body) for _, _, _, body, _ in self.seen if body]


class Reply:
    def __init__(self) -> None:
        self.status, self.done = 0, False
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def gateway(
    plan=None, *, engines=1, overlay=True, recorder=None, fetcher=None, log=None, grammars=None,
    **config,
):  # fmt: skip
    """A gateway in front of a recorder, as ``(app, recorder)``."""
    plan = plan or plan_for()
    recorder = recorder or Recorder()
    urls = [f"http://127.0.0.1:{9000 + i}" for i in range(engines)]
    bounds, settings = bounds_of(plan, overlay=overlay), GatewayConfig(**config)
    app = Gateway(bounds, urls, settings, log, fetcher, recorder, grammars=grammars)
    return app, recorder


async def call(
    app, path=CHAT, body=None, *, method=None, headers=None, raw=None, leave=None, kind=None
) -> Reply:
    """One request. ``leave`` is an event whose setting means that the client goes away."""
    data = raw if raw is not None else (b"" if body is None else json.dumps(body).encode())
    method = method or ("POST" if data or body is not None else "GET")
    sent = {"content-type": kind or "application/json"} if method == "POST" else {}
    sent.update(headers or {})
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode("latin-1"),
        "client": ("127.0.0.1", 1), "query_string": b"",
        "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in sent.items()],
    }  # fmt: skip
    reply, given, forever = Reply(), [], leave or asyncio.Event()

    async def receive():
        if not given:
            given.append(1)
            return {"type": "http.request", "body": data, "more_body": False}
        await forever.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            assert reply.status == 0
            reply.status = message["status"]
            reply.headers = {k.decode(): v.decode("latin-1") for k, v in message["headers"]}
        else:
            assert not reply.done
            reply.chunks.append(message["body"])
            reply.done = not message["more_body"]

    await app(scope, receive, send)
    return reply


def ask(app, *args, **keywords) -> Reply:
    """`call`, from outside a loop."""
    return asyncio.run(call(app, *args, **keywords))
