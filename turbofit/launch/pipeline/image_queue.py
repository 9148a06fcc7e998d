"""In-process admission: the requests of a pipeline that may be at its engine together."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from turbofit.gateway.limits.gate import UNSTATED, Cost

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from turbofit.gateway.limits.gate import Gate

__all__ = ["queued"]


def queued(
    generate: Callable[..., AsyncIterator[Any]], gate: Gate, units: int
) -> Callable[..., AsyncIterator[Any]]:
    """``AsyncEngine.generate`` with the requests of one engine held to its gate.

    Each request with images counts as one at the plan's limit, so over: smaller images could share
    a forward. One that does not show whether it holds images counts so too. The first argument of
    ``generate`` is the preprocessed request; ``units`` are those of a request at the plan's limit.
    """
    line = _Line(gate)

    async def in_turn(request: Any, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        cost = _cost(request, units)
        await line.enter(cost)
        begun = False
        try:
            async with aclosing(generate(request, *arguments, **keywords)) as answer:  # type: ignore[type-var]
                async for item in answer:
                    if not begun and gate.begin(cost):
                        line.pump()
                    begun = True
                    yield item
        finally:
            # The engine has dropped it: LMDeploy's generator ends so.
            gate.end(cost)
            line.pump()

    return in_turn


class _Line:
    """The requests that wait, in order of arrival; `Admission` says which may pass others."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._waiting: deque[tuple[Cost, asyncio.Future[None]]] = deque()

    async def enter(self, cost: Cost) -> None:
        """Wait for room, and take it."""
        passes = cost.light and not any(other.light for other, _ in self._waiting)
        if (passes or not self._waiting) and self._gate.fits(cost):
            self._gate.take(cost)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((cost, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._gate.end(cost)  # what it was just given
            self.pump()
            raise

    def pump(self) -> None:
        """Let in the requests that have room now."""
        while self._waiting:
            cost, turn = self._waiting[0]
            if not turn.cancelled():
                if not self._gate.fits(cost):
                    return
                self._gate.take(cost)
                turn.set_result(None)
            self._waiting.popleft()


def _cost(request: Any, units: int) -> Cost:
    """What a preprocessed request will hold: LMDeploy has counted its prompt's tokens already."""
    inputs = getattr(request, "inputs", None)
    images = inputs is None or bool(inputs.get("multimodal"))
    prompt = getattr(request, "input_token_len", None)
    answer = getattr(getattr(request, "gen_config", None), "max_new_tokens", None)
    return Cost(
        units=units if images else 0,
        tokens=UNSTATED if prompt is None or answer is None else prompt + answer,
    )
