"""Remembers tests of plans on these cards, and finds new settings after a lack of memory.

A plan is proved once its engines have answered its worst cases. The bytes that they then
held beyond the forecast are kept for the same plan with any cache ratio. A plan is the same if the
model's shape, the settings, the cards, the driver, LMDeploy and torch are the same; otherwise it is
tested again. The result of a rehearsal is used again if the same plan is made, and as much memory
is free.

A rung is new settings to try after a start that ran out of memory: a larger margin, fewer tokens in
a forward, smaller images, fewer engines. The ladder is the rungs that a run tries, one after
another. `recall` returns the settings that an earlier run came to.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from turbofit.core.installation import installed
from turbofit.core.messages import plural
from turbofit.core.plan import Plan
from turbofit.core.struct import Struct, known, to_builtins
from turbofit.core.units import MIB, format_bytes, round_up
from turbofit.core.version import __version__
from turbofit.machine.learned import learned
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.calibrated import identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from turbofit.core.engine_end import End
    from turbofit.core.machine import Machine
    from turbofit.core.plan import GpuLedger
    from turbofit.core.process.files import StateFile
    from turbofit.core.struct import Options
    from turbofit.serving.options import ServeConfig

#: Variables that change what torch allocates.
_ALLOCATOR: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: The share of a card by which others may hold more than at the rehearsal: the step of a ratio.
_STEP: Final = 0.001
#: Phases of a ledger that change with the free memory.
_MOVING: Final = ("before", "cache")


class Proved(Struct, tag_field="schema", tag="turbofit.proved/1"):
    """The file that proves a plan: the day on which its engines answered the worst cases.

    The file's name stands for the plan.
    """

    day: str


class Held(Struct, tag_field="schema", tag="turbofit.held/1"):
    """The most bytes beyond the forecast that a plan's engines held on a GPU; may be negative."""

    over: int


class Proof:
    """Tells whether the worst cases of a plan were answered here; `keep` records that they were."""

    def __init__(self, plan: Plan, config: ServeConfig, lmdeploy: str) -> None:
        uuids = [gpu.uuid for gpu in plan.ledgers]
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
        """Bytes beyond the forecast that engines of this plan held, at any cache ratio.

        None if nobody measured it.
        """
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
    """Return everything in a plan that its engines' memory depends on, except free memory.

    Without ``ratio`` the cache ratio is left out. Names and paths of the model do not matter:
    checkpoints of one shape take the same memory.
    """
    settings = [engine.settings for engine in plan.engines]
    settings = settings if ratio else [replace(one, cache_max_entry_count=0.0) for one in settings]
    nameless = dict.fromkeys(("name", "source", "hub_id", "revision", "warnings"))
    model = {**to_builtins(plan.model), **nameless}
    units = [engine.units_per_forward for engine in plan.engines]
    return [model, plan.backend, plan.groups, plan.promise.limits, settings, units]


class Rehearsed(Struct, tag_field="schema", tag="turbofit.rehearsed/2"):
    """A plan as its rehearsal corrected it, to use instead of the plan that was rehearsed."""

    plan: Plan


class Rehearsals:
    """Keeps a plan as its rehearsal on this machine corrected it, with the installed versions."""

    def __init__(self, plan: Plan) -> None:
        versions = (__version__, *(installed(name) or "" for name in ("lmdeploy", "torch")))
        ledgers = [
            [gpu.uuid, gpu.total, gpu.reserved, gpu.margin]
            + [[term.term, term.bytes] for term in gpu.terms if term.phase not in _MOVING]
            for gpu in plan.ledgers
        ]
        facts, model = (versions, ledgers, plan.workload), identity(plan.model)
        self._file = learned("rehearsed", Rehearsed, model, _facts(plan), facts)

    def recall(self, here: Machine) -> Plan | None:
        """Return the rehearsed plan; None if none is kept, or if a card has less memory free."""
        kept = self._file.read()
        if kept is None:
            return None
        for gpu in kept.plan.ledgers:
            card = here.gpu(gpu.index)
            free = known(card.free, 0)
            if card.uuid != gpu.uuid or free < gpu.free - _STEP * gpu.total:
                return None
        return kept.plan

    def keep(self, plan: Plan) -> None:
        self._file.write(Rehearsed(plan=plan))


#: The most rungs of a run: starts with new settings after one that ran out of memory.
MOST_RUNGS: Final = 3

#: Bytes that are assumed to be missing if no log says how many.
_UNKNOWN: Final = 512 * MIB
_LEAST_PREFILL: Final = 512


class Rung(Struct):
    """New settings to try after a start that failed: planner's keywords that change, and why."""

    changes: dict[str, Any]
    why: str


def rungs(ended: End, plan: Plan, fixed: Options) -> Iterator[Rung]:
    """Yield new settings that may help after an engine's end, the best for its phase first.

    ``plan`` is the plan whose engine ended; ``fixed`` has the planner's keywords that the user
    gave.
    """
    steps = {
        "host": (_fewer_engines,),
        "start": (_more_margin,),
        "weights": (_more_margin,),
        "cache": (_more_margin, _smaller_prefill),
        "warm-up": (_smaller_prefill, _more_margin),
        "vision": (_more_margin, _fewer_units, _smaller_prefill),
        "text": (_more_margin, _smaller_prefill),
    }
    chosen = (_smaller_prefill,) if ended.kind == "hang" else steps.get(ended.phase, steps["text"])
    if ended.kind == "out_of_memory" and ended.phase == "warm-up" and ended.missing is not None:
        # The missing bytes are known, so the cache can give exactly these.
        chosen = (_more_margin, _smaller_prefill)
    for step in chosen:
        rung = step(ended, plan, fixed)
        if rung is not None:
            yield rung


def _more_margin(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:
    """Return a rung with a larger margin, which leads to a smaller cache or to other engines.

    In the phase that failed, the engine used all bytes that the forecast left free, and lacked
    `missing` bytes more. The margin grows by the sum of these two numbers.
    """
    if "cache_max_entry_count" in fixed and "tp" in fixed:
        return None
    ledgers = plan.ledgers if ended.group is None else plan.engines[ended.group].ledgers
    tightest = min(ledgers, key=lambda gpu: gpu.headroom - gpu.margin)
    missing = _UNKNOWN if ended.missing is None else max(1, ended.missing)
    measured = "as it was" if ended.missing is not None else "assumed"
    if plan.backend.is_pytorch and missing < _UNKNOWN:
        # Torch allocates in pieces: after the refused piece it would have asked for more.
        missing, measured = _UNKNOWN, "at least, and more to come"
    wrong = max(0, _left(tightest, ended.phase)) + missing
    why = f"{format_bytes(missing)} were missing ({measured}): planned with"
    margin = round_up(tightest.margin + wrong, MIB)
    return Rung(changes={"margin": margin}, why=f"{why} a margin of {format_bytes(margin)}")


def _left(gpu: GpuLedger, phase: str | None) -> int:
    if phase in ("start", "weights"):
        return gpu.usable - gpu.load_peak
    if phase == "cache":
        return gpu.usable - (gpu.steady - gpu.bytes_of(POOL_WARMUP))
    return gpu.usable - (gpu.steady if phase == "warm-up" else gpu.peak)


def _smaller_prefill(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:
    """Return a rung with half the tokens in a forward: warm-up and activations shrink with them.

    All engines get the same number of tokens, and no engine gets more than now.
    """
    engine = plan.smallest if ended.group is None else plan.engines[ended.group]
    now = [each.settings.max_prefill_token_num for each in plan.engines]
    tokens = min([engine.settings.max_prefill_token_num // 2, *now])
    if "max_prefill_token_num" in fixed or tokens < _LEAST_PREFILL:
        return None
    if plan.backend.serial:  # a prompt is one forward there
        return None
    why = "the warm-up did not fit" if ended.phase == "warm-up" else "a forward did not fit"
    return Rung(
        changes={"max_prefill_token_num": tokens}, why=f"{why}: max_prefill_token_num {tokens}"
    )


def _fewer_units(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:  # noqa: ARG001
    rule, now = plan.model.image_rule, plan.promise.image_limit
    if rule is None or rule.limit_name in fixed or "image_size" in fixed:
        return None
    if now is None or now // 2 < rule.least_limit:
        return None
    name, half = rule.limit_name, now // 2
    return Rung(changes={name: half}, why=f"images did not fit: {name} {half}")


def _fewer_engines(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:  # noqa: ARG001
    """Return a rung with one engine fewer, since each engine takes host memory of its own."""
    replicas = plan.replicas - 1
    if "replicas" in fixed or replicas < 1:
        return None
    changes: dict[str, Any] = {"replicas": replicas}
    if len(set(map(len, plan.groups))) == 1:
        changes["tp"] = plan.tp
    return Rung(
        changes=changes, why=f"host memory ran out: {replicas} {plural(replicas, 'engine')}"
    )


class Learned(Struct, tag_field="schema", tag="turbofit.learned/1"):
    """The settings that failed starts led to, for the next start of this model on these cards."""

    changes: dict[str, Any]


def recall(plan: Plan, lmdeploy: str, *, pretend: bool) -> Options:
    """Return the settings that failed starts of this model on these cards led to; empty if none.

    They are keywords of the planner.
    """
    found = learned_file(plan, lmdeploy, pretend=pretend).read()
    return {} if found is None else found.changes


def learned_file(plan: Plan, lmdeploy: str, *, pretend: bool) -> StateFile[Learned]:
    """Return the state file of `Learned` for a plan's model, the machine's cards, and LMDeploy.

    All visible cards count, since a rung may use fewer of them.
    """
    model, cards = plan.model, sorted(plan.machine.gpu(i).name for i in plan.machine.visible)
    facts = (model.hub_id or model.name, model.source.checkpoint or "", cards, lmdeploy)
    return learned("changes", Learned, identity(model), *facts, pretend=pretend)
