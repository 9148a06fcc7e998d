"""Finds new settings after a lack of memory, and remembers those that a run came to.

A rung is new settings to try after a start that ran out of memory: a larger margin, fewer tokens in
a forward, smaller images, fewer engines. The ladder is the rungs that a run tries, one after
another. `recall` returns the settings that an earlier run came to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from turbofit.core.engine_end import End
from turbofit.core.messages import plural
from turbofit.core.plan import GpuLedger, Plan
from turbofit.core.process.files import StateFile
from turbofit.core.struct import Options, Struct
from turbofit.core.units import MIB, format_bytes, round_up
from turbofit.machine.learned import learned
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.calibrated import identity
from turbofit.serving.proved import Learned

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
