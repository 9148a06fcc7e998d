"""Keeps a pipeline's requests within its plan: their parameters, and how many run at once."""

from __future__ import annotations

import asyncio
import copy
import inspect
import warnings
from contextlib import aclosing
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import UsageError
from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.gate import UNSTATED, Cost
from turbofit.gateway.limits.parameters import GENERATION, RULES
from turbofit.gateway.limits.ranges import hold_fields

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from turbofit.core.json_types import Options
    from turbofit.gateway.limits.gate import Gate
    from turbofit.gateway.limits.rules import Scope


def hold_config(config: Any, scope: Scope) -> Any:
    """A copy of a GenerationConfig within the ranges; warns of what was lowered.

    Fields that the table does not know come from a later LMDeploy, and stay as they are.
    """
    result = copy.copy(config)
    fields = {name: value for name, value in vars(result).items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in GENERATION}
    changes = hold_fields(GENERATION, fields, scope)
    vars(result).update(fields)
    if changes:
        warnings.warn(f"lowered to what the engine takes: {', '.join(changes)}", stacklevel=2)
    return result


#: Parameters of ``preprocess`` that `Pipeline` itself passes.
_GIVEN: Final = ("messages", "session_id", "input_ids")
#: Keywords of `Pipeline.infer`, `.stream_infer` and `.chat` that do not reach the engine.
_OF_CALLS: Final = ("sessions", "stream_response", "multiplex")


def check_keywords(engine: Any, keywords: Options) -> None:
    """Refuse keywords of a call that LMDeploy would drop in silence.

    Raises:
        UsageError: LMDeploy would drop a keyword; the hint says where it belongs.
    """
    preprocess = getattr(engine, "preprocess", None)
    if preprocess is None:
        return
    named = inspect.signature(preprocess).parameters.values()
    known = [p.name for p in named if p.kind is not p.VAR_KEYWORD and p.name not in _GIVEN]
    for name, value in keywords.items():
        if name in known or name in _OF_CALLS:
            continue
        hint = f"the keywords of a call are {', '.join(known)}"
        if name in GENERATION:
            hint = f"give gen_config=GenerationConfig({name}={value!r}), from lmdeploy"
        raise UsageError(f"LMDeploy drops {name}={value!r} of a pipeline's call", hint=hint)


def hold_engine(engine: Any, scope: Scope) -> None:
    """Keep requests to LMDeploy's ``AsyncEngine`` in range; a refusal is the request's error."""
    preprocess = getattr(engine, "preprocess", None)
    if preprocess is None:
        warnings.warn("this LMDeploy's parameters are not held to their ranges", stacklevel=2)
        return
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    signature = inspect.signature(preprocess)

    @wraps(preprocess)
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

    engine.preprocess = holding


def queued(
    generate: Callable[..., AsyncIterator[Any]], gate: Gate, units: int
) -> Callable[..., AsyncIterator[Any]]:
    """``AsyncEngine.generate``, with the requests of one engine held to its gate.

    Its first argument is the preprocessed request. A request that has images, or does not show
    whether it has, counts ``units``, as many as a request may have at the plan's limit: this
    overestimates smaller images. Later requests that need less room may pass one that waits.
    """
    room = asyncio.Event()

    def look_again() -> None:
        """Wake the waiting requests, which look for room in order of arrival."""
        nonlocal room
        room.set()
        room = asyncio.Event()

    async def in_turn(request: Any, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        cost = _cost(request, units)
        while not gate.fits(cost):
            await room.wait()
        share, begun = gate.take(cost), False
        try:
            async with aclosing(generate(request, *arguments, **keywords)) as answer:  # type: ignore[type-var]
                async for item in answer:
                    if not begun:
                        begun = True
                        gate.begin(share)
                        look_again()
                    yield item
        finally:
            # The engine has dropped the request: LMDeploy's generator ends only then.
            gate.end(share)
            look_again()

    return in_turn


def _cost(request: Any, units: int) -> Cost:
    """The vision units and tokens that a preprocessed request will hold."""
    inputs = getattr(request, "inputs", None)
    images = inputs is None or bool(inputs.get("multimodal"))
    prompt = getattr(request, "input_token_len", None)
    answer = getattr(getattr(request, "gen_config", None), "max_new_tokens", None)
    return Cost(
        units=units if images else 0,
        tokens=UNSTATED if prompt is None or answer is None else prompt + answer,
    )
