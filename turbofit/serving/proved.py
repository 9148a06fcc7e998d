"""Remembers what engines and rehearsals of a plan proved on these cards.

A plan is proved once its engines have answered its worst cases. The bytes that they then held
beyond the forecast hold for the same plan with any cache ratio. A plan is the same if the model's
shape, the settings, the cards, the driver, LMDeploy and torch are the same; otherwise it is tested
again. The result of a rehearsal is used again if the same plan is made, and as much memory is free.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from msgspec import field
from msgspec.structs import replace

from turbofit.core.installation import installed
from turbofit.core.plan import Plan
from turbofit.core.struct import Struct, known, to_builtins
from turbofit.core.version import __version__
from turbofit.machine.learned import learned
from turbofit.memory.calibrated import identity

if TYPE_CHECKING:
    from turbofit.core.machine import Machine
    from turbofit.serving.options import ServeConfig

#: Variables that change what torch allocates.
_ALLOCATOR: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: The share of a card by which others may hold more than at the rehearsal: the step of a ratio.
_STEP: Final = 0.001
#: Phases of a ledger that change with the free memory.
_MOVING: Final = ("before", "cache")


class Learned(Struct, tag_field="schema", tag="turbofit.learned/2"):
    """What starts and rehearsals here showed; a file has the fields that its name decides.

    ``days``: when the engines answered the worst cases, by the plan's cache ratios. ``over``: the
    most bytes beyond the forecast that they then held on a GPU; may be negative; None if nobody
    measured it. ``rehearsed``: the plan as its rehearsal corrected it. ``changes``: the settings
    that failed starts led to, for the next start of this model on these cards.
    """

    days: dict[str, str] = field(default_factory=dict)
    over: int | None = None
    rehearsed: Plan | None = None
    changes: dict[str, Any] = field(default_factory=dict)


class Proof:
    """Tells whether the worst cases of a plan were answered here; `keep` records that they were."""

    def __init__(self, plan: Plan, config: ServeConfig, lmdeploy: str) -> None:
        uuids = [gpu.uuid for gpu in plan.ledgers]
        here = (lmdeploy, installed("torch") or "", plan.machine.driver, uuids)
        allocator = [os.environ.get(name, "") for name in _ALLOCATOR]
        facts = (_facts(plan), here, config.options, allocator, config.pretend)
        self._ratios = str(ratios(plan))
        self._file = learned("proved", Learned, identity(plan.model), facts)

    @property
    def day(self) -> str:
        """The day when the plan was proved; empty if it was not."""
        return self._kept().days.get(self._ratios, "")

    @property
    def over(self) -> int | None:
        """Bytes beyond the forecast that engines of this plan held, at any cache ratio.

        None if nobody measured it.
        """
        return self._kept().over

    def _kept(self) -> Learned:
        return self._file.read() or Learned()

    def keep(self, over: int | None = None) -> None:
        """Record the proof, and the bytes beyond the forecast if they were measured."""
        kept = self._kept()
        measured = [each for each in (kept.over, over) if each is not None]
        days = {**kept.days, self._ratios: time.strftime("%Y-%m-%d")}
        self._file.write(Learned(days=days, over=max(measured, default=None)))

    def forget(self) -> None:
        """Forget the proof at all cache ratios: less of the cache may have been luck, too."""
        self._file.forget()


def ratios(plan: Plan) -> list[float]:
    """Return the cache ratio of each engine."""
    return [engine.settings.cache_max_entry_count for engine in plan.engines]


def _facts(plan: Plan) -> list[Any]:
    """Return everything in a plan that its engines' memory depends on.

    Free memory and cache ratios are left out. Names and paths of the model do not matter:
    checkpoints of one shape take the same memory.
    """
    settings = [replace(engine.settings, cache_max_entry_count=0.0) for engine in plan.engines]
    nameless = dict.fromkeys(("name", "source", "hub_id", "revision", "warnings"))
    model = {**to_builtins(plan.model), **nameless}
    units = [engine.units_per_forward for engine in plan.engines]
    return [model, plan.backend, plan.groups, plan.promise.limits, settings, units]


class Rehearsals:
    """Keeps a plan as its rehearsal here corrected it; the key has the installed versions."""

    def __init__(self, plan: Plan) -> None:
        versions = (__version__, *(installed(name) or "" for name in ("lmdeploy", "torch")))
        ledgers = [
            [gpu.uuid, gpu.total, gpu.reserved, gpu.margin]
            + [[term.term, term.bytes] for term in gpu.terms if term.phase not in _MOVING]
            for gpu in plan.ledgers
        ]
        facts = (_facts(plan), ratios(plan), versions, ledgers, plan.workload)
        self._file = learned("rehearsed", Learned, identity(plan.model), facts)

    def recall(self, here: Machine) -> Plan | None:
        """Return the rehearsed plan; None if none is kept, or if a card has less memory free."""
        kept = self._file.read()
        if kept is None or kept.rehearsed is None:
            return None
        for gpu in kept.rehearsed.ledgers:
            card = here.gpu(gpu.index)
            free = known(card.free, 0)
            if card.uuid != gpu.uuid or free < gpu.free - _STEP * gpu.total:
                return None
        return kept.rehearsed

    def keep(self, plan: Plan) -> None:
        self._file.write(Learned(rehearsed=plan))
