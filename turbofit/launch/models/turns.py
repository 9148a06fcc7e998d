"""Which model makes way where another one is asked for and not all run at once. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from turbofit.gateway.models.served_model import ServedModel

__all__ = ["LULL_SECONDS", "gives_way"]

#: A model without a request for so long makes way before its turn is over.
LULL_SECONDS: Final = 2.0


def gives_way(models: Iterable[ServedModel], turn: float, now: float) -> ServedModel | None:
    """The model that was used least recently of those whose turn is over; None where none is.

    A turn is over after so many seconds of being ready, or with a lull in its requests. So a model
    that serves is not ended right after its long start, and a model that is idle keeps nobody
    waiting.

    Args:
        models: those that run.
        turn: seconds.
        now: by the models' clock.
    """
    over = [
        model
        for model in models
        if model.state == "ready" and (now - model.ready_at >= turn or model.idle >= LULL_SECONDS)
    ]
    return min(over, key=lambda model: now if model.in_flight else model.used_at, default=None)
