"""What a pipeline's engine is asked, held to the plan: parameters, and requests at one time."""

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
    """A copy of a GenerationConfig inside the ranges; what was lowered is a warning.

    Fields that the table does not know are a later LMDeploy's, and stay.
    """
    result = copy.copy(config)
    fields = {name: value for name, value in vars(result).items() if value is not None}
    fields = {name: value for name, value in fields.items() if name in GENERATION}
    changes = hold_fields(GENERATION, fields, scope)
    vars(result).update(fields)
    if changes:
        warnings.warn(f"lowered to what the engine takes: {', '.join(changes)}", stacklevel=2)
    return result


#: What `Pipeline` itself gives to ``preprocess``.
_GIVEN: Final = ("messages", "session_id", "input_ids")
#: Of `Pipeline.infer`, `.stream_infer` and `.chat`, which the engine does not see.
_OF_CALLS: Final = ("sessions", "stream_response", "multiplex")


def check_keywords(engine: Any, keywords: Options) -> None:
    """Refuse keywords of a call that LMDeploy would drop without a word, and say where they go.

    Raises:
        UsageError: LMDeploy would drop one of them.
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
    """Hold what LMDeploy's ``AsyncEngine`` is asked; a refusal becomes the request's own error."""
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
    """``AsyncEngine.generate`` with the requests of one engine held to its gate.

    Its first argument is the preprocessed request. One with images, or that does not show whether
    it has some, counts ``units``, those of a request at the plan's limit: over, since smaller
    images could share a forward. Later requests that need less room may pass one that waits.
    """
    room = asyncio.Event()

    def look_again() -> None:
        """Have those that wait look for room, in order of arrival."""
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
            # The engine has dropped it: LMDeploy's generator ends so.
            gate.end(share)
            look_again()

    return in_turn


def _cost(request: Any, units: int) -> Cost:
    """What a preprocessed request will hold: LMDeploy has counted its prompt's tokens."""
    inputs = getattr(request, "inputs", None)
    images = inputs is None or bool(inputs.get("multimodal"))
    prompt = getattr(request, "input_token_len", None)
    answer = getattr(getattr(request, "gen_config", None), "max_new_tokens", None)
    return Cost(
        units=units if images else 0,
        tokens=UNSTATED if prompt is None or answer is None else prompt + answer,
    )
