"""LMDeploy's GenerationConfig held to the ranges that the gateway holds requests to."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import TYPE_CHECKING, Any

from turbofit.gateway.http.refusals import Refusal
from turbofit.gateway.limits.parameters import GENERATION, RULES
from turbofit.gateway.limits.ranges import hold_fields

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from turbofit.gateway.limits.rules import Scope

__all__ = ["hold_config", "hold_engine"]


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
