"""What an address of several models shows of itself: health, names, numbers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from turbofit.gateway.http.metrics import DROPPED, logs_text, merge
from turbofit.gateway.http.pages import ModelCard
from turbofit.gateway.routing.health import healthy

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from turbofit.core.json_types import Document, JsonObject
    from turbofit.gateway.config import GatewayConfig
    from turbofit.gateway.http.metrics import Metrics
    from turbofit.gateway.models.served_model import ServedModel

__all__ = ["cards_of", "health_document", "metrics_text"]

_OUR_METRICS: Final = (
    ("model_ready", "gauge", "Whether a model's engines are ready."),
    ("model_waiting", "gauge", "Requests that wait for a model's start."),
    ("model_in_flight", "gauge", "Requests that a model's gateway has."),
    ("model_starts_total", "counter", "Starts of a model that became ready."),
    ("model_start_seconds", "gauge", "What a model's last start took."),
)


def _fine(model: ServedModel) -> bool:
    """Whether a request for it is answered, after a start where its engines do not run."""
    if model.state == "ready":
        return model.gateway is not None and healthy(model.gateway.fleet)
    return model.state != "failed" or model.rested


def _facts(model: ServedModel) -> Document:
    """Where one model stands."""
    unanswered = model.state == "ready" and not _fine(model)
    facts: dict[str, Any] = {
        "state": "unavailable" if unanswered else model.state, "waiting": len(model.waiting),
    }  # fmt: skip
    if model.expected is not None:
        facts["start_seconds"] = round(model.expected, 1)
    if model.state not in ("ready", "asleep"):
        facts.update(message=model.said, retry_after=model.retry_after)
    return facts


def health_document(models: Sequence[ServedModel], *, opened: bool, known: bool) -> Document:
    """``healthy``, ``degraded`` where some models do not answer, ``starting`` or ``unavailable``.

    A model that sleeps is well: it starts when it is asked for.

    Args:
        models: all of them.
        opened: whether those that start at once were ready.
        known: whether the client may learn which models there are, and why one does not start.
    """
    fine = [_fine(model) for model in models]
    status = "healthy" if all(fine) else "degraded" if any(fine) else "unavailable"
    if not opened:
        status = "starting"
    if not known:
        return {"status": status, "models": len(models), "up": sum(fine)}
    return {"status": status, "models": {model.name: _facts(model) for model in models}}


def cards_of(models: Sequence[ServedModel]) -> list[ModelCard]:
    """Every name of each model, the model's own first."""
    return [ModelCard(name, one.name, _facts(one)) for one in models for name in one.names]


async def metrics_text(
    models: Sequence[ServedModel], metrics: Metrics, config: GatewayConfig
) -> str:
    """Each model's page with a label ``model``, and this address's numbers."""
    pages = await asyncio.gather(*(_page(model, config) for model in models))
    lines = []
    for name, kind, explained in _OUR_METRICS:
        full = f"turbofit_{name}"
        lines += [f"# HELP {full} {explained}", f"# TYPE {full} {kind}"]
        for model in models:
            value = _number(model, name)
            if value is not None:
                lines.append(f'{full}{{model="{model.name}"}} {value:g}')
    named: dict[int | str, str] = {
        model.name: page for model, page in zip(models, pages, strict=True)
    }
    # An empty label is none: what is refused before a model is known.
    ours = merge({**named, "": metrics.text({})}, "model")
    return ours + "\n".join(lines) + "\n" + logs_text()


def _number(model: ServedModel, name: str) -> float | None:
    return {
        "model_ready": float(model.state == "ready"),
        "model_waiting": float(len(model.waiting)),
        "model_in_flight": float(model.in_flight),
        "model_starts_total": float(model.starts),
        "model_start_seconds": model.start_seconds,
    }[name]


async def _page(model: ServedModel, config: GatewayConfig) -> str:
    """The page of a model's gateway; empty where it is asleep."""
    gateway = model.gateway
    if gateway is None:
        return ""
    chunks: list[bytes] = []

    async def receive() -> JsonObject:
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        chunks.append(message.get("body", b""))

    key = config.api_keys[0].encode() if config.api_keys else b""
    await gateway(
        {
            "type": "http", "method": "GET", "path": "/metrics", "raw_path": b"/metrics",
            "headers": [(b"authorization", b"Bearer " + key)] if key else [],
        },
        receive,
        send,
    )  # fmt: skip
    return b"".join(chunks).decode().partition(f"# HELP {DROPPED}")[0]
