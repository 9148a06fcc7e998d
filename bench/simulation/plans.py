"""Plans that were found, and are found again in this process."""

from __future__ import annotations

from typing import Any

import msgspec

from bench.simulation.modules import world
from turbofit.core.errors import TurbofitError

__all__ = ["remembered"]

#: Plans and errors that were found, by what was asked; the oldest go.
_PLANS: dict[bytes, Any] = {}
_MOST_PLANS = 20_000


def remembered(real: Any) -> Any:
    """Planning is pure: equal questions have equal answers, over all worlds of a run.

    Args:
        real: `planner.best_plan`.
    """

    def best_plan(request: Any) -> Any:
        key = _question(request)
        plan = _PLANS.get(key)
        if plan is None:
            plan = _found(real, request)
        elif not isinstance(plan, TurbofitError):
            plan = _with_holders(plan, request.on)
        if key not in _PLANS:
            if len(_PLANS) >= _MOST_PLANS:
                del _PLANS[next(iter(_PLANS))]
            _PLANS[key] = plan
        if isinstance(plan, TurbofitError):
            raise plan.with_traceback(None)
        world().planned(plan)
        return plan

    return best_plan


def _question(request: Any) -> bytes:
    """What a plan depends on: all that is asked, and the machine without names of processes."""
    gpus = tuple(msgspec.structs.replace(one, holders=()) for one in request.on.gpus)
    bare = msgspec.structs.replace(request.on, gpus=gpus)
    asked = {name: one for name, one in request.given().items() if name != "on"}
    return msgspec.json.encode([bare, asked], enc_hook=str)


def _found(real: Any, request: Any) -> Any:
    try:
        return real(request)
    except TurbofitError as exc:
        return exc


def _with_holders(plan: Any, machine: Any) -> Any:
    """A remembered plan for a machine that is equal but for who holds its memory."""
    holders = {one.uuid: one.holders for one in machine.gpus}
    gpus = tuple(
        msgspec.structs.replace(one, holders=holders[one.uuid]) for one in plan.machine.gpus
    )
    return msgspec.structs.replace(plan, machine=msgspec.structs.replace(plan.machine, gpus=gpus))
