"""The two pages of the gateway itself: how it is, and its numbers beside the engines'."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec

from turbofit.gateway.http.metrics import logs_text, merge
from turbofit.gateway.routing.health import healthy
from turbofit.gateway.routing.request_context import answer

if TYPE_CHECKING:
    from turbofit.gateway.http.asgi import Send
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.quarantine.suspects import Suspects
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.fleet import Fleet
    from turbofit.gateway.routing.request_context import RequestContext
    from turbofit.gateway.routing.upstream import Upstream

__all__ = ["health_page", "metrics_page"]

_PAGE_SECONDS: Final = 3.0
_ALL_SECONDS: Final = 9.0  # below Prometheus' own ten
#: Engines that are asked for their page at once.
_AT_ONCE: Final = 32


async def health_page(request: RequestContext, send: Send, fleet: Fleet) -> None:
    """200 where at least one engine answers completions, else 503."""
    fine = healthy(fleet)
    page: dict[str, str | int] = {
        "status": "healthy" if fine else "unavailable",
        "engines": len(fleet),
        "up": sum(engine.up for engine in fleet),
    }
    outage = fleet.outage
    if not fine and outage is not None:
        page.update(status="resting", message=outage.message)
    if not fine:
        seconds = fleet.retry_seconds if outage is None else outage.seconds_left
        request.out.append((b"retry-after", str(seconds).encode()))
    body = msgspec.json.encode(page)
    await answer(request, send, 200 if fine else 503, body, "application/json")


async def metrics_page(  # noqa: PLR0913 - what one page shows
    request: RequestContext,
    send: Send,
    fleet: Fleet,
    upstream: Upstream,
    metrics: Metrics,
    admission: Admission,
    connections: int,
    suspects: Suspects,
) -> None:
    """Everything in Prometheus' text format; engines that do not answer in time are left out."""
    pages: dict[int | str, str] = {}
    rest = iter(fleet.engines)

    async def some() -> None:
        for engine in rest:
            pages[engine.label] = ""  # which keeps the engines' order
            pages[engine.label] = await upstream.page(engine, "/metrics", _PAGE_SECONDS)

    crew = asyncio.gather(*(some() for _ in range(min(_AT_ONCE, len(fleet)))))
    with suppress(asyncio.TimeoutError, TimeoutError):
        await asyncio.wait_for(crew, _ALL_SECONDS)
    text = merge(pages) + metrics.text(
        {**_gauges(fleet, admission, connections), **_suspected(suspects)}
    )
    text += logs_text()
    kind = "text/plain; version=0.0.4; charset=utf-8"
    await answer(request, send, 200, text.encode(), kind)


def _gauges(
    fleet: Fleet, admission: Admission, connections: int
) -> dict[str, list[tuple[tuple[str, ...], float]]]:
    labelled = [((f"engine={engine.label}",), engine) for engine in fleet]
    return {
        "connections": [((), connections)],
        "waiting": [((), admission.waiting)],
        "in_flight": [(label, engine.outstanding) for label, engine in labelled],
        "units_in_flight": [(label, engine.units) for label, engine in labelled],
        "kv_tokens_reserved": [
            (label, engine.gate.reserved) for label, engine in labelled if engine.gate is not None
        ],
        "host_bytes_in_flight": [(label, engine.host_bytes) for label, engine in labelled],
        "engine_up": [(label, int(engine.up)) for label, engine in labelled],
    }


def _suspected(suspects: Suspects) -> dict[str, list[tuple[tuple[str, ...], float]]]:
    suspected, convicted = suspects.number
    return {
        "suspects": [((), suspected)],
        "convicted": [((), convicted)],
        "clients_refused": [((), suspects.accounts.refused)],
    }
