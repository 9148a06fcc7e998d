"""Finds new settings after a lack of memory, and remembers the last settings of a run.

A rung is new settings to try after a start that ran out of memory: a larger margin, fewer tokens in
a forward, smaller images, fewer engines. The ladder is the sequence of rungs that a run tries.
`recall` returns the last settings of an earlier run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from turbofit.core.engine_end import End
from turbofit.core.messages import counted
from turbofit.core.plan import GpuLedger, Plan
from turbofit.core.process.files import StateFile
from turbofit.core.struct import Options, Struct
from turbofit.core.units import MIB, format_bytes, round_up
from turbofit.machine.learned import learned
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.calibrated import identity
from turbofit.serving.proved import Learned

#: The most rungs of a run.
MOST_RUNGS: Final = 3

#: Bytes that are assumed to be missing if no log says how many.
_UNKNOWN: Final = 512 * MIB
_LEAST_PREFILL: Final = 512


class Rung(Struct):
    """New settings after a failed start: changes of the planner's keywords, and their reason.

    ``promises_less``: clients may then send less than the last plan promised.
    """

    changes: dict[str, Any]
    why: str
    promises_less: bool = False


def rungs(ended: End, plan: Plan, fixed: Options) -> Iterator[Rung]:
    """Yield new settings that may help after an engine's end, the most promising first.

    Which settings come first depends on the phase in which the engine ended. ``plan`` is the plan
    of the engine that ended; ``fixed`` has the planner's keywords that the user gave.
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
        # The number of missing bytes is known, and the cache can shrink by this number.
        chosen = (_more_margin, _smaller_prefill)
    for step in chosen:
        rung = step(ended, plan, fixed)
        if rung is not None:
            yield rung


def _more_margin(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:
    """Return a rung with a larger margin, which leads to a smaller cache or to other engines.

    In the failed phase, the engine used all bytes that the forecast left free, and `missing` more
    bytes were needed. The margin grows by the sum of the two numbers.
    """
    if "cache_max_entry_count" in fixed and "tp" in fixed:
        return None
    ledgers = plan.ledgers if ended.group is None else plan.engines[ended.group].ledgers
    tightest = min(ledgers, key=lambda gpu: gpu.headroom - gpu.margin)
    missing = _UNKNOWN if ended.missing is None else max(1, ended.missing)
    source = "by the log" if ended.missing is not None else "assumed"
    if plan.backend.is_pytorch and missing < _UNKNOWN:
        # Torch allocates in pieces; after the refused piece, torch needs more pieces.
        missing, source = _UNKNOWN, "at least"
    wrong = max(0, _left(tightest, ended.phase)) + missing
    why = f"{format_bytes(missing)} were missing ({source}): planned with"
    margin = round_up(tightest.margin + wrong, MIB)
    return Rung(changes={"margin": margin}, why=f"{why} a margin of {format_bytes(margin)}")


def _left(gpu: GpuLedger, phase: str | None) -> int:
    """Return the bytes that the forecast left free on a GPU in a phase."""
    if phase in ("start", "weights"):
        return gpu.usable - gpu.load_peak
    if phase == "cache":
        return gpu.usable - (gpu.steady - gpu.bytes_of(POOL_WARMUP))
    return gpu.usable - (gpu.steady if phase == "warm-up" else gpu.peak)


def _smaller_prefill(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:
    """Return a rung with half the tokens in a forward, for a smaller warm-up and activations.

    All engines get the same number of tokens, at most the present number of each engine.
    """
    now = [engine.settings.max_prefill_token_num for engine in plan.engines]
    failed = max(now) if ended.group is None else now[ended.group]
    tokens = min([failed // 2, *now])
    if "max_prefill_token_num" in fixed or tokens < _LEAST_PREFILL:
        return None
    if plan.backend.serial:  # these engines read a whole prompt in one forward
        return None
    why = "the warm-up did not fit" if ended.phase == "warm-up" else "a forward did not fit"
    return Rung(
        changes={"max_prefill_token_num": tokens}, why=f"{why}: max_prefill_token_num {tokens}"
    )


def _fewer_units(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:  # noqa: ARG001
    """Return a rung with half the image limit, for fewer vision units."""
    rule, now = plan.model.image_rule, plan.promise.image_limit
    if rule is None or rule.limit_name in fixed or "image_size" in fixed:
        return None
    if now is None or now // 2 < rule.least_limit:
        return None
    name, half = rule.limit_name, now // 2
    why = f"images did not fit: {name} {half}"
    return Rung(changes={name: half}, why=why, promises_less=True)


def _fewer_engines(ended: End, plan: Plan, fixed: Mapping[str, Any]) -> Rung | None:  # noqa: ARG001
    """Return a rung with one engine fewer, since each engine takes host memory."""
    replicas = plan.replicas - 1
    if "replicas" in fixed or replicas < 1:
        return None
    changes: dict[str, Any] = {"replicas": replicas}
    if len(set(map(len, plan.groups))) == 1:
        changes["tp"] = plan.tp
    return Rung(changes=changes, why=f"host memory ran out: {counted(replicas, 'engine')}")


def recall(plan: Plan, lmdeploy: str, *, pretend: bool) -> Options:
    """Return the planner's keywords that failed starts here learned; empty without such starts."""
    found = learned_file(plan, lmdeploy, pretend=pretend).read()
    return {} if found is None else found.changes


def learned_file(plan: Plan, lmdeploy: str, *, pretend: bool) -> StateFile[Learned]:
    """Return the state file of `Learned` for a plan's model, the machine's cards, and LMDeploy.

    The file depends on all visible cards, since a rung may use fewer cards.
    """
    model, cards = plan.model, sorted(plan.machine.gpu(i).name for i in plan.machine.visible)
    facts = (model.hub_id or model.name, model.source.checkpoint or "", cards, lmdeploy)
    return learned("changes", Learned, identity(model), *facts, pretend=pretend)
