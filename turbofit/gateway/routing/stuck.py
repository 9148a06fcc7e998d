"""Which requests an engine is stuck in, told apart from slow ones by the engine's progress. Pure.

- A stream of which nothing has come for long, while the engine brought others their tokens for as
  long and nothing waits in its queue: each sequence that runs gets a token a step, so that this one
  does not run any more.
- An answer that has not begun for long, while the engine itself counts no request that runs or
  waits: it has lost this one, or its preparation never ends. LMDeploy 0.18 counts a request only
  once its images are prepared (`serve/core/async_engine.py`), which takes seconds.

Both must hold at two looks. What waits in the engine's queue, or is evicted from its cache for
others, is slow and not stuck, however long it takes. Under: an answer in one piece shows no token,
so that one which is stuck beside others that run is found only when those have ended. An engine of
which nothing comes at all is `health.Monitor`'s to judge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from turbofit.core.struct import Struct
from turbofit.observe.prometheus import parse_page

if TYPE_CHECKING:
    from collections.abc import Collection

    from turbofit.gateway.routing.suspects import Present

__all__ = ["EngineLoad", "InFlight", "engine_load", "stuck_requests"]


class InFlight(Protocol):
    """A request at an engine: when a byte last came (or it was sent), whether one ever did.

    ``present``: None where it has no body.
    """

    heard_at: float
    present: Present | None

    @property
    def begun(self) -> bool:
        """Whether a byte of its answer came."""

    def abort(self, *, died: bool, stuck: bool = False) -> None:
        """End it: the engine died of something, or is stuck in it."""


class EngineLoad(Struct):
    """What an engine says of itself; ``tokens`` are all that it ever read or wrote."""

    running: int
    queued: int
    tokens: float


def engine_load(page: str) -> EngineLoad | None:
    """What LMDeploy's metrics page says; None where it says nothing of it."""
    found = parse_page(page)
    running = found.total("lmdeploy:num_requests_running")
    queued = found.total("lmdeploy:num_requests_waiting")
    if running is None or queued is None:
        return None
    queued += max(0.0, found.total("lmdeploy:num_api_requests_waiting") or 0.0)
    tokens = (
        found.total(f"lmdeploy:{what}_tokens_total") or 0.0 for what in ("prompt", "generation")
    )
    return EngineLoad(running=int(running), queued=int(queued), tokens=sum(tokens))


def stuck_requests(
    requests: Collection[InFlight], load: EngineLoad | None, now: float, patience: float
) -> set[InFlight]:
    """Those that the engine seems to be stuck in.

    Args:
        requests: all that this gateway has at the engine.
        load: what the engine says; None where it does not tell.
        now: by the clock of the requests.
        patience: seconds of silence that are none.
    """
    newest = max((one.heard_at for one in requests if one.begun), default=float("-inf"))
    silent = [one for one in requests if now - one.heard_at >= patience]
    found = set()
    if load is None or not load.queued:
        found = {one for one in silent if one.begun and newest - one.heard_at >= patience}
    if load is not None and not load.running and not load.queued:
        found.update(one for one in silent if not one.begun)
    return found
