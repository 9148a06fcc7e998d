"""The gateway's own pages: how it is, its numbers beside the engines', which names there are."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from turbofit.gateway.http.metrics import logs_text, merge
from turbofit.gateway.routing.health import healthy
from turbofit.gateway.routing.request_context import answer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.json_types import Document
    from turbofit.gateway.http.asgi import Send
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.http.refusals import Api
    from turbofit.gateway.routing.admission import Admission
    from turbofit.gateway.routing.deny_list import DenyList
    from turbofit.gateway.routing.engines import Fleet
    from turbofit.gateway.routing.request_context import RequestContext
    from turbofit.gateway.routing.upstream import Upstream

__all__ = ["ModelCard", "health_page", "metrics_page", "models_document", "names_page"]

_CREATED: Final = int(time.time())
_PAGE_SECONDS: Final = 3.0


async def health_page(
    request: RequestContext, send: Send, fleet: Fleet, about: Document, *, draining: bool
) -> None:
    """200 where at least one engine answers completions, else 503."""
    fine = healthy(fleet)
    page: Document = {
        "status": "healthy" if fine else "unavailable",
        "engines": len(fleet),
        "up": sum(engine.up for engine in fleet),
        "draining": draining,
        **about,
    }
    outage = fleet.outage
    if not fine and outage is not None:
        page.update(status="resting", message=outage.message)
    if not fine:
        request.out.append((b"retry-after", str(fleet.retry_seconds).encode()))
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
    deny_list: DenyList,
) -> None:
    """Everything in Prometheus' text format; engines that do not answer in time are left out."""
    asked = [upstream.page(engine, "/metrics", _PAGE_SECONDS) for engine in fleet]
    pages: dict[int | str, str] = dict(enumerate(await asyncio.gather(*asked)))
    text = merge(pages) + metrics.text(
        {**_gauges(fleet, admission, connections), **_suspected(deny_list)}
    )
    text += logs_text()
    kind = "text/plain; version=0.0.4; charset=utf-8"
    await answer(request, send, 200, text.encode(), kind)


def _gauges(
    fleet: Fleet, admission: Admission, connections: int
) -> dict[str, list[tuple[tuple[str, ...], float]]]:
    labelled = [((f"engine={engine.index}",), engine) for engine in fleet]
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


def _suspected(deny_list: DenyList) -> dict[str, list[tuple[tuple[str, ...], float]]]:
    requests, clients = deny_list.file.number
    return {
        "suspects": [((), deny_list.suspected)],
        "convicted": [((), requests)],
        "clients_refused": [((), clients)],
    }


class ModelCard(NamedTuple):
    """A name that clients may give, the model that it means, and where that stands."""

    name: str
    model: str
    facts: Document | None = None


def models_document(cards: Sequence[ModelCard], api: Api) -> Document:
    """The list of names in the form of its API; ``root`` is the model that a name means."""
    facts = [{} if one.facts is None else {"turbofit": one.facts} for one in cards]
    if api == "anthropic":
        data = [
            {"type": "model", "id": one.name, "display_name": one.model, **more}
            for one, more in zip(cards, facts, strict=True)
        ]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}
    return {
        "object": "list",
        "data": [
            {
                "id": one.name, "object": "model", "created": _CREATED, "owned_by": "lmdeploy",
                "root": one.model, "parent": None, "permission": [], **more,
            }
            for one, more in zip(cards, facts, strict=True)
        ],
    }  # fmt: skip


async def names_page(request: RequestContext, send: Send, names: Mapping[str, str]) -> None:
    """Answer with all names of a server's only model."""
    cards = [ModelCard(*one) for one in names.items()]
    page = msgspec.json.encode(models_document(cards, request.api))
    await answer(request, send, 200, page, "application/json")
