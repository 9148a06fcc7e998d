"""What a gateway tells about itself: its plan's limits and memory, and the chat page."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Final

import msgspec

from turbofit.core.memory_stack import KINDS, equal_ledgers, memory_label, stack, sums
from turbofit.core.messages import counted, indices
from turbofit.core.plan import Plan
from turbofit.core.struct import Document, Struct
from turbofit.core.units import format_bytes
from turbofit.gateway.http.routes import ROUTES
from turbofit.gateway.limits.request_limits import Bounds

_PAGE: Final = Path(__file__).with_name("page.html")
_ROUTES: Final = "<!--routes-->"


@cache
def chat_page() -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """Return the chat page with a list of the routes, and the headers of its answer.

    With these headers a browser runs only the page's own script. The file is read only once.
    """
    rows = []
    for path, route in ROUTES.items():
        shown = escape(path)
        link = f'<a href="{shown}">{shown}</a>' if route.method == "GET" else shown
        rows.append(f"<tr><td>{route.method}</td><td>{link}</td></tr>")
    text = _PAGE.read_text(encoding="utf-8").replace(_ROUTES, "".join(rows))
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
    return text.encode(), headers


def _digest(text: str, name: str) -> str:
    """Return the hash of the page's only element ``name``, for its content security policy."""
    (content,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


class MemoryPart(Struct):
    """A piece of a `MemoryBar`; ``size`` is the number of ``bytes`` as a text with a unit."""

    kind: str
    name: str
    bytes: int
    size: str


class MemoryBar(Struct):
    """A bar that shows the planned memory of equal GPUs, made of ``pieces`` in their order."""

    gpus: tuple[int, ...]
    label: str
    pieces: tuple[MemoryPart, ...]


class ModelFacts(Struct):
    """The facts of one model that the chat page shows.

    ``limits`` are sentences; ``images`` is the most images of a request if all are small.
    """

    name: str
    limits: tuple[str, ...]
    images: int
    memory: tuple[MemoryBar, ...] = ()


class ClockFacts(Struct):
    """How time passes on pretend GPUs, and the seconds that the host has lost so far.

    Each forward takes ``factor`` times the seconds of the forecast; ``words`` is a sentence about
    the factor and the certainty of the forecast. ``busy`` is the forecast's seconds of all
    forwards. ``late`` is the seconds by which the host noticed the ends of forwards too late.
    ``idle`` is the seconds in which GPUs waited for the host. ``late`` and ``idle`` belong to the
    engine with the largest sum of both.
    """

    factor: float
    words: str
    late: float = 0.0
    idle: float = 0.0
    busy: float = 0.0


class About(Struct):
    """The answer of `/about`; ``clock`` is None without pretend GPUs that have a clock."""

    pretend: bool
    key: bool
    notices: tuple[str, ...]
    models: tuple[ModelFacts, ...]
    clock: ClockFacts | None = None


def memory_bars(plan: Plan) -> tuple[MemoryBar, ...]:
    """Return the bars that show a plan's memory, one for each set of equal GPUs."""
    return tuple(
        MemoryBar(
            gpus=tuple(members),
            label=f"GPU {indices(members)}, {ledger.name}: {memory_label(ledger)}",
            pieces=tuple(
                MemoryPart(kind=kind, name=KINDS[kind][1], bytes=size, size=format_bytes(size))
                for kind, size in sums(stack(ledger)).items()
            ),
        )
        for members, ledger in equal_ledgers(plan.ledgers)
    )


def facts_of(
    names: Iterable[str], bounds: Bounds, more: Iterable[str], memory: tuple[MemoryBar, ...] = ()
) -> tuple[ModelFacts, ...]:
    """Return the facts of each model of one plan for the chat page.

    ``more`` are sentences that follow the limits.
    """
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
    """Return phrases that tell the reader of the chat page what a request may contain."""
    limits, rule = bounds.limits, bounds.rule
    words = [bounds.promise.words(rule)]
    if (most := limits.most_images(rule)) > limits.images_per_request:
        words.append(f"or {most} smaller images")
    if limits.image_limit is not None and most:
        words.append("a larger image is made smaller")
    copies, beside = limits.copies(images=False), limits.copies(images=True)
    fewer = f", {beside} with images" if beside < copies and limits.vision_unit else ""
    words.append(f"{counted(copies, 'answer')} at once (n){fewer}")
    return [*words, f"a body of {format_bytes(limits.bytes_per_body)}"]


def about_plan(plan: Plan) -> Document:
    """Return the part of `/health` that tells a front a plan's capacity, limits and digest."""
    limits = plan.promise.limits
    return {
        "at_once": plan.requests_at_once,
        "kv_tokens": plan.kv_tokens,
        "context": plan.promise.context,
        "images": limits.images_per_request if limits.vision_unit is not None else 0,
        "image_limit": limits.image_limit,
        "bytes_per_body": limits.bytes_per_body,
        "prefix_caching": plan.prefix_caching,
        "plan": digest_of(plan),
    }


def digest_of(plan: Plan) -> str:
    """Return a hash of a plan's settings and limits, by which two plans can be compared."""
    engines = [(engine.gpus, engine.settings, engine.units_per_forward) for engine in plan.engines]
    promise = (plan.promise.limits, plan.promise.context)
    parts = (plan.model.name, plan.backend, engines, promise)
    return sha256(msgspec.json.encode(parts)).hexdigest()[:16]
