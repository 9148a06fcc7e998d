"""The settings that would have worked: turbofit's plan for the model and machine of a log."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Remedy
from turbofit.core.units import format_bytes
from turbofit.core.version import REFERENCE
from turbofit.diagnose.answer import Advice
from turbofit.diagnose.case import with_used
from turbofit.memory.versions import is_legacy
from turbofit.model.presets import four_bit_variant
from turbofit.observe.log_events import KvBlocks, LegacyCuda
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.rules.draft import RuleAnswer

_SHOWN: Final = ("tp", "cache_max_entry_count", "max_prefill_token_num", "max_batch_size",
                 "session_len", "dtype", "quant_policy")  # fmt: skip
_LIMITS: Final = ("max_dynamic_patch", "max_pixels_per_image")
#: An older engine's ratio beside the plan's.
_RATIO: Final = (
    f"these settings are for LMDeploy {REFERENCE}: until 0.15 torch took an image's memory out of"
    " what the ratio left, so that this ratio and an older release's cannot be compared"
)
_LOADED_HERE: Final = (
    "this log ran out of memory while it loaded there: where nothing else was on the cards, the"
    " account is too low, and a quantised variant or more GPUs are what helps"
)
_CALIBRATED: Final = "a checkpoint that is quantised already needs no calibration"


def advice(case: LogCase, draft: RuleAnswer) -> Advice | None:
    """Return the plan as advice; None if the log tells no model or no machine.

    If the log's program quantises a checkpoint, the advice is a published 4-bit variant.
    """
    if case.machine is None or case.on is None or case.model is None:
        return None
    if case.facts.subject.quantises:
        ways, name = _smaller(case.model), case.model.name
        quantised = Advice(model=name, on=case.on, fits=None, verdict=_CALIBRATED, remedies=ways)
        return quantised if ways else None
    machine, spec = case.machine, case.on
    if draft.by_others:
        machine = with_used(machine, draft.by_others)
        spec, (_, comma, links) = case.named(machine), case.on.partition(",")
        spec += f"{comma}{links}" if links not in spec else ""
    try:
        request = PlanRequest.of(model=case.model, on=machine)
        plan = best_plan(request, compares_limits=False)
        if not plan.fits and draft.by_others:
            alone = best_plan(request.changed(on=case.machine), compares_limits=False)
            if alone.fits:
                return _planned(case, alone, case.on, f"once the cards are free: {alone.verdict}")
    except TurbofitError as exc:
        return Advice(
            model=case.model.name, on=spec, fits=None, verdict=f"{exc.message} ({exc.hint})"
        )
    planned = _planned(case, plan, spec, plan.verdict)
    if not _contradicts(case, draft, plan):
        return planned
    verdict = f"by turbofit's account it {plan.verdict}"
    return replace(planned, fits=None, verdict=verdict, note=_LOADED_HERE)


def _contradicts(case: LogCase, draft: RuleAnswer, plan: Plan) -> bool:
    """Whether loading failed on at least as many GPUs per model as the plan takes for it."""
    loading = (draft.kind, draft.phase) == ("out_of_memory", "weights")
    alone = case.facts.subject.of_lmdeploy and not draft.by_others
    return plan.fits and loading and alone and plan.parallel.tp <= (case.tp or 1)


def _planned(case: LogCase, plan: Plan, spec: str, verdict: str) -> Advice:
    version = case.facts.subject.version
    older = (version is not None and is_legacy(version)) or (
        case.facts.first(KvBlocks) or case.facts.first(LegacyCuda)
    )
    shown = _SHOWN if plan.engine.on_torch else (*_SHOWN, "communicator")
    values: dict[str, object] = {"engine": plan.engine.name}
    values |= {name: _value(plan, name) for name in shown}
    values["replicas"] = plan.parallel.replicas
    limits = {name: getattr(plan.limits, name) for name in _LIMITS}
    values |= {name: limit for name, limit in limits.items() if limit is not None}
    return Advice(
        model=plan.model.name,
        on=spec,
        fits=plan.fits,
        verdict=verdict,
        settings=values if plan.fits else {},
        command="" if plan.serve is None else shlex.join(plan.serve.argv),
        note=_RATIO if older and plan.fits and plan.engine.of_lmdeploy else "",
        remedies=plan.remedies or _smaller(plan.model),
    )


def _value(plan: Plan, name: str) -> object:
    """The value of a setting; if the groups of engines differ, all their values in order."""
    values = [getattr(group.settings, name) for group in plan.group_plans()]
    return values[0] if len(set(values)) == 1 else " | ".join(map(str, values))


def _smaller(model: Model) -> tuple[Remedy, ...]:
    """A remedy that names the model's published 4-bit variant; empty if there is none."""
    variant = four_bit_variant(model)
    if variant is None:
        return ()
    saved = format_bytes(model.weight_bytes - variant.weight_bytes)
    change = f"{variant.hub_id or variant.name} instead"
    return (Remedy(change=change, effect=f"{saved} less of weights, which the cache gets"),)
