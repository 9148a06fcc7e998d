"""The page at the address that `serve` prints: a chat, the limits, examples, the routes.

The page is one file, the same for everybody. It reads the facts of this server from `/about`, with
the key if one is needed; a client without the key learns only where to enter it.
"""

from __future__ import annotations

import json
import re
import shlex
from base64 import b64encode
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from turbofit.core.memory_stack import KINDS, fold, memory_label, stack, sums
from turbofit.core.messages import indices, plural
from turbofit.core.struct import Struct
from turbofit.core.units import format_bytes
from turbofit.gateway.http.routes import ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.core.plan import Plan
    from turbofit.gateway.limits.request_limits import Bounds

#: The most tokens of the example's answer.
_ANSWER: Final = 50
_PAGE: Final = Path(__file__).with_name("page.html")
_ROUTES: Final = "<!--routes-->"


def is_page(raw_path: bytes) -> bool:
    """Whether a path is this page's: the address itself, or the usual path of a server's docs."""
    return raw_path.rstrip(b"/") in (b"", b"/docs")


class Page(NamedTuple):
    """The page, and headers that let a browser run no script but the page's own."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


@cache
def chat_page() -> Page:
    """The page, which is read once."""
    text = _PAGE.read_text(encoding="utf-8").replace(_ROUTES, _routes())
    policy = (
        f"default-src 'none'; script-src {_digest(text, 'script')}; style-src"
        f" {_digest(text, 'style')}; img-src data:; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    headers = (
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    )
    return Page(text.encode(), headers)


def _digest(text: str, name: str) -> str:
    """The hash of an element's content, by which a policy names it; the element is unique."""
    (content,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


def _routes() -> str:
    rows = []
    for path, route in ROUTES.items():
        shown = escape(path)
        link = f'<a href="{shown}">{shown}</a>' if route.method == "GET" else shown
        rows.append(f"<tr><td>{route.method}</td><td>{link}</td></tr>")
    return "".join(rows)


class MemoryPart(Struct):
    """A piece of the bar that shows a GPU's memory, in bytes."""

    kind: str
    name: str
    bytes: int
    size: str


class MemoryBar(Struct):
    """The planned memory of equal GPUs, as a bar from empty to full."""

    gpus: tuple[int, ...]
    label: str
    pieces: tuple[MemoryPart, ...]


class ModelFacts(Struct):
    """The page's facts on one model.

    ``limits`` are sentences; ``images`` is how many a request may have, if they are small.
    """

    name: str
    limits: tuple[str, ...]
    images: int
    memory: tuple[MemoryBar, ...] = ()


class About(Struct):
    """The answer of `/about`."""

    pretend: bool
    key: bool
    notices: tuple[str, ...]
    models: tuple[ModelFacts, ...]

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


def memory_bars(plan: Plan) -> tuple[MemoryBar, ...]:
    """The bars of a plan, one for each set of equal GPUs."""
    return tuple(
        MemoryBar(
            gpus=tuple(members),
            label=f"GPU {indices(members)}, {ledger.name}: {memory_label(ledger)}",
            pieces=tuple(
                MemoryPart(kind=kind, name=KINDS[kind][1], bytes=size, size=format_bytes(size))
                for kind, size in sums(stack(ledger)).items()
            ),
        )
        for members, ledger in fold(plan.gpus)
    )


def client_lines(url: str, model: str, *, key: bool) -> list[str]:
    """Example requests, one for a shell, one for Python; they read a ``key`` from ``API_KEY``."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": model, "messages": messages, "max_tokens": _ANSWER}
    headers = ["-H 'Content-Type: application/json'"]
    if key:
        headers.append('-H "Authorization: Bearer $API_KEY"')
    secret = 'os.environ["API_KEY"]' if key else '"none"'
    imports = "import openai, os" if key else "import openai"
    return [
        f"curl {url}/v1/chat/completions {' '.join(headers)} -d {shlex.quote(json.dumps(body))}",
        f'{imports}; print(openai.OpenAI(base_url="{url}/v1", api_key={secret})'
        f".chat.completions.create(model={json.dumps(model)}, messages={json.dumps(messages)},"
        f" max_tokens={_ANSWER}).choices[0].message.content)",
    ]


def facts_of(
    names: Iterable[str], bounds: Bounds, more: Iterable[str], memory: tuple[MemoryBar, ...] = ()
) -> tuple[ModelFacts, ...]:
    """The facts of models that one plan serves; ``more`` are sentences after its limits."""
    limits = bounds.limits
    return tuple(
        ModelFacts(
            name=name,
            limits=(*limits_in_words(bounds), *more),
            images=limits.most_images(bounds.rule),
            memory=memory,
        )
        for name in names
    )


def limits_in_words(bounds: Bounds) -> list[str]:
    limits, rule = bounds.limits, bounds.rule
    units, tokens = limits.units_per_image, limits.image_tokens_per_request
    words = [limits.promise(bounds.longest_request_tokens, units, tokens)]
    if (most := limits.most_images(rule)) > limits.images_per_request:
        words.append(f"or {most} smaller images")
    if limits.image_limit is not None and most:
        words.append("a larger image is made smaller")
    copies, beside = limits.copies(images=False), limits.copies(images=True)
    fewer = f", {beside} with images" if beside < copies and limits.vision_unit else ""
    words.append(f"{copies} {plural(copies, 'answer')} at once (n){fewer}")
    return [*words, f"a body of {format_bytes(limits.bytes_per_body)}"]
