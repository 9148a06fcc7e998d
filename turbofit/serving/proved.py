"""Remembers plans that were tested on these cards and need no second test.

A plan is proved once its engines have answered its worst cases. What they then held beyond the
forecast is kept for the same plan with any cache ratio. Its memory depends on the model's
shape, the settings, the cards, the driver, LMDeploy and torch. If any of these differs, it is
another plan, which is tested again. A rehearsal holds as long as its plan would be made again and
the memory is free.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.installation import installed
from turbofit.core.plan import Plan
from turbofit.core.struct import Struct, known, to_builtins
from turbofit.core.version import __version__
from turbofit.machine.learned import learned
from turbofit.memory.calibrated import identity

if TYPE_CHECKING:
    from turbofit.core.machine import Machine
    from turbofit.serving.config import ServeConfig

#: Variables that change what torch allocates.
_ALLOCATOR: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: The share of a card by which others may hold more than at the rehearsal: the step of a ratio.
_STEP: Final = 0.001
#: Phases of a ledger that change with the free memory.
_MOVING: Final = ("before", "cache")


class Proved(Struct, tag_field="schema", tag="turbofit.proved/1"):
    """The day when the worst cases were answered; all that they rest on is in the file's name."""

    day: str


class Held(Struct, tag_field="schema", tag="turbofit.held/1"):
    """The most bytes beyond the forecast that engines of a plan held on a GPU; may be negative."""

    over: int


class Proof:
    """Tells whether the worst cases of a plan were answered here; `keep` records that they were."""

    def __init__(self, plan: Plan, config: ServeConfig, lmdeploy: str) -> None:
        uuids = [gpu.uuid for gpu in plan.gpus]
        here = (lmdeploy, installed("torch") or "", plan.machine.driver, uuids)
        allocator = [os.environ.get(name, "") for name in _ALLOCATOR]
        facts, model = (here, config.options, allocator, config.pretend), identity(plan.model)
        self._file = learned("proved", Proved, model, _facts(plan), facts)
        self._held = learned("held", Held, model, _facts(plan, ratio=False), facts)

    @property
    def day(self) -> str:
        """The day when the plan was proved; empty if it was not."""
        kept = self._file.read()
        return "" if kept is None else kept.day

    @property
    def over(self) -> int | None:
        """Bytes beyond the forecast that such a plan's engines held; None if nobody measured it."""
        kept = self._held.read()
        return None if kept is None else kept.over

    def keep(self, over: int | None = None) -> None:
        """Record the proof, and the bytes beyond the forecast if they were measured."""
        self._file.write(Proved(day=time.strftime("%Y-%m-%d")))
        if over is not None:
            before = self.over
            self._held.write(Held(over=over if before is None else max(before, over)))

    def forget(self) -> None:
        self._file.forget()
        self._held.forget()


def _facts(plan: Plan, *, ratio: bool = True) -> list[Any]:
    """Everything in a plan that its engines' memory depends on, except free memory.

    Without ``ratio`` it is that of the plan with any cache ratio. Names and paths of the model do
    not matter: checkpoints of one shape take the same memory.
    """
    settings = [group.settings for group in plan.group_plans()]
    settings = settings if ratio else [replace(one, cache_max_entry_count=0.0) for one in settings]
    nameless = dict.fromkeys(("name", "source", "hub_id", "revision", "warnings"))
    model = {**to_builtins(plan.model), **nameless}
    return [model, plan.engine, plan.parallel.groups, plan.limits, settings]


class Rehearsed(Struct, tag_field="schema", tag="turbofit.rehearsed/1"):
    """The plan that a rehearsal made from another plan."""

    plan: Plan


class Rehearsals:
    """The rehearsal's result for a plan on this machine, with the installed versions."""

    def __init__(self, plan: Plan) -> None:
        versions = (__version__, *(installed(name) or "" for name in ("lmdeploy", "torch")))
        ledgers = [
            [gpu.uuid, gpu.total, gpu.reserved, gpu.margin]
            + [[term.term, term.bytes] for term in gpu.ledger if term.phase not in _MOVING]
            for gpu in plan.gpus
        ]
        facts, model = (versions, ledgers, plan.workload), identity(plan.model)
        self._file = learned("rehearsed", Rehearsed, model, _facts(plan), facts)

    def recall(self, here: Machine) -> Plan | None:
        """The rehearsed plan, if others hold no more of its cards than at the rehearsal."""
        kept = self._file.read()
        if kept is None:
            return None
        for gpu in kept.plan.gpus:
            card = here.gpu(gpu.index)
            free = known(card.free, 0)
            if card.uuid != gpu.uuid or free < gpu.free - _STEP * gpu.total:
                return None
        return kept.plan

    def keep(self, plan: Plan) -> None:
        self._file.write(Rehearsed(plan=plan))
