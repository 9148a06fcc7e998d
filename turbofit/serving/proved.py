"""Remembers the proofs of a plan by engines and rehearsals on these cards.

A plan is proved when its engines have answered its worst cases. Two plans are the same if the
model's dimensions, the cards, the driver, LMDeploy, torch and all settings except the cache ratio
are equal; another plan is checked again. So the bytes that engines held beyond the forecast are
valid at any ratio. A rehearsal's result is used again for the same plan if as much memory is free.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final

from msgspec import field
from msgspec.structs import replace

from turbofit.core.installation import installed
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan
from turbofit.core.struct import Struct, known, to_builtins
from turbofit.core.version import __version__
from turbofit.machine.learned import learned
from turbofit.memory.calibrated import identity
from turbofit.serving.options import ServeConfig

#: Variables that change torch's allocations.
_ALLOCATOR: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: The share of a card by which free memory may shrink after the rehearsal: one step of a ratio.
_STEP: Final = 0.001
#: Phases of a ledger whose bytes change with the free memory.
_MOVING: Final = ("before", "cache")


class Learned(Struct, tag_field="schema", tag="turbofit.learned/2"):
    """Results of starts and rehearsals here; a file of one kind has only some of these fields.

    ``days``: the days on which engines answered the worst cases, by the plan's cache ratios.
    ``over``: the most bytes on a GPU that these engines held beyond the forecast, negative if the
    engines held less; None if not measured. ``rehearsed``: the plan with the corrections of its
    rehearsal. ``changes``: the settings of the next start on these cards, after failed starts.
    """

    days: dict[str, str] = field(default_factory=dict)
    over: int | None = None
    rehearsed: Plan | None = None
    changes: dict[str, Any] = field(default_factory=dict)


class Proof:
    """The record that engines here answered a plan's worst cases; `keep` writes the record."""

    def __init__(self, plan: Plan, config: ServeConfig, lmdeploy: str) -> None:
        """Find the file for the facts that decide the memory of the plan's engines."""
        uuids = [gpu.uuid for gpu in plan.ledgers]
        here = (lmdeploy, installed("torch") or "", plan.machine.driver, uuids)
        allocator = [os.environ.get(name, "") for name in _ALLOCATOR]
        facts = (_facts(plan), here, config.options, allocator, config.pretend)
        self._ratios = str(ratios(plan))
        self._file = learned("proved", Learned, identity(plan.model), facts)

    @property
    def day(self) -> str:
        """The day of the plan's proof; empty without a proof."""
        return self._kept().days.get(self._ratios, "")

    @property
    def over(self) -> int | None:
        """Bytes on a GPU that engines of this plan held beyond the forecast, at any cache ratio.

        None if not measured.
        """
        return self._kept().over

    def _kept(self) -> Learned:
        return self._file.read() or Learned()

    def keep(self, over: int | None = None) -> None:
        """Record the proof, and ``over``, the measured bytes beyond the forecast, if any."""
        kept = self._kept()
        measured = [each for each in (kept.over, over) if each is not None]
        days = {**kept.days, self._ratios: time.strftime("%Y-%m-%d")}
        self._file.write(Learned(days=days, over=max(measured, default=None)))

    def forget(self) -> None:
        """Forget the proof at all cache ratios: a smaller cache may have fitted by luck."""
        self._file.forget()


def ratios(plan: Plan) -> list[float]:
    """Return the cache ratio of each engine."""
    return [engine.settings.cache_max_entry_count for engine in plan.engines]


def _facts(plan: Plan) -> list[Any]:
    """Return all facts of a plan that decide its engines' memory, apart from cache ratios.

    Free memory is left out. Names and paths of the model do not matter: checkpoints of one shape
    take the same memory.
    """
    settings = [replace(engine.settings, cache_max_entry_count=0.0) for engine in plan.engines]
    nameless = dict.fromkeys(("name", "source", "hub_id", "revision", "warnings"))
    model = {**to_builtins(plan.model), **nameless}
    units = [engine.units_per_forward for engine in plan.engines]
    return [model, plan.backend, plan.groups, plan.promise.limits, settings, units]


class Rehearsals:
    """Keeps a plan with its rehearsal's corrections, for these cards and installed versions."""

    def __init__(self, plan: Plan) -> None:
        """Find the file for the facts that decide what a rehearsal of the plan shows."""
        versions = (__version__, *(installed(name) or "" for name in ("lmdeploy", "torch")))
        ledgers = [
            [gpu.uuid, gpu.total, gpu.reserved, gpu.margin]
            + [[term.term, term.bytes] for term in gpu.terms if term.phase not in _MOVING]
            for gpu in plan.ledgers
        ]
        facts = (_facts(plan), ratios(plan), versions, ledgers, plan.workload)
        self._file = learned("rehearsed", Learned, identity(plan.model), facts)

    def recall(self, here: Machine) -> Plan | None:
        """Return the rehearsed plan; None if no plan is kept, or if a card has less memory free."""
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
