"""What a pipeline's engine is asked, held to the plan: parameters, and requests at one time."""

from __future__ import annotations

import asyncio
import copy
import inspect
import warnings
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import UNSTATED, Cost
from turbofit.gateway.limits.parameters import GENERATION, RULES
from turbofit.gateway.limits.ranges import hold_fields

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from turbofit.gateway.limits.gate import Gate
    from turbofit.gateway.limits.rules import Scope


def hold_config(config: Any, scope: Scope) -> Any:
    """A copy of a GenerationConfig inside the ranges; what was lowered is a warning.

    Fields that the table does not know are a later LMDeploy's, and stay.

    Raises:
        Refusal: a value that cannot be brought into its range.
    """
    made = copy.copy(config)
    fields = {name: value for name, value in vars(made).items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in GENERATION}
    said = hold_fields(GENERATION, fields, scope)
    vars(made).update(fields)
    if said:
        warnings.warn(f"lowered to what the engine takes: {', '.join(said)}", stacklevel=2)
    return made


def hold_engine(engine: Any, scope: Scope) -> None:
    """Hold what LMDeploy's ``AsyncEngine`` is asked to the ranges, from now on.

    A refusal becomes the request's own error, as LMDeploy's are.
    """
    preprocess = getattr(engine, "preprocess", None)
    if preprocess is None:
        warnings.warn("this LMDeploy's parameters are not held to their ranges", stacklevel=2)
        return
    engine.preprocess = _holding(preprocess, scope)


def _holding(
    preprocess: Callable[..., Awaitable[Any]], scope: Scope
) -> Callable[..., Awaitable[Any]]:
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    signature = inspect.signature(preprocess)

    async def holding(*arguments: Any, **keywords: Any) -> Any:
        call = signature.bind(*arguments, **keywords)
        config, ids = call.arguments.get("gen_config"), call.arguments.get("input_ids")
        try:
            if config is not None:
                call.arguments["gen_config"] = hold_config(config, scope)
            if ids is not None:
                RULES["generate"]["input_ids"].hold("input_ids", list(ids), scope)
        except Refusal as refusal:
            raise RequestError(ErrorCode.INVALID_REQUEST, refusal.message) from None
        return await preprocess(*call.args, **call.kwargs)

    return holding


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
