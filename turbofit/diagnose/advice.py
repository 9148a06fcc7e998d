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
from turbofit.observe.log_events import KvBlocks, LegacyCuda, PeerMissing
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.request import PlanRequest

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.rules.draft import RuleAnswer

_RATIO: Final = "cache_max_entry_count"
_SHOWN: Final = ("tp", _RATIO, "max_prefill_token_num", "max_batch_size",
                 "session_len", "dtype", "quant_policy", "communicator")  # fmt: skip


def advice(case: LogCase, draft: RuleAnswer) -> Advice | None:
    """Return the plan as advice; None if the log tells no model or no machine.

    If the log's program quantises a checkpoint, the advice is a published 4-bit variant.
    """
    if case.machine is None or case.on is None or case.model is None:
        return None
    if case.facts.subject.quantises:
        return _published(case, case.on)
    machine, spec = case.machine, case.on
    if draft.others:
        machine, spec = with_used(machine, spec, draft.others)
    try:
        request = PlanRequest.of(model=case.model, on=machine)
        plan = best_plan(request, compares_limits=False)
        if not plan.fits and draft.others:
            alone = best_plan(request.changed(on=case.machine), compares_limits=False)
            if alone.fits:
                return _planned(case, alone, case.on, f"once the cards are free: {alone.verdict}")
    except TurbofitError as exc:
        return Advice(
            model=case.model.name, on=spec, fits=None, verdict=f"{exc.message} ({exc.hint})"
        )
    return _doubted(case, draft, plan, _planned(case, plan, spec, plan.verdict))


def _published(case: LogCase, on: str) -> Advice | None:
    """Advice to use a published variant that is already quantised, instead of a plan."""
    assert case.model is not None
    if not (ways := _smaller(case)):
        return None
    verdict = "a checkpoint that is quantised already needs no calibration"
    return Advice(model=case.model.name, on=on, fits=None, verdict=verdict, remedies=ways)


def _doubted(case: LogCase, draft: RuleAnswer, plan: Plan, planned: Advice) -> Advice:
    """The advice, as doubtful if loading failed on at least as many GPUs per model as planned."""
    loading = (draft.kind, draft.phase) == ("out_of_memory", "weights")
    alone = case.facts.subject.of_lmdeploy and not draft.others
    if not (plan.fits and loading and alone) or plan.parallel.tp > (case.tp or 1):
        return planned
    return replace(
        planned,
        fits=None,
        verdict=f"by turbofit's account it {planned.verdict}",
        note="this log ran out of memory while it loaded there: where nothing else was on the"
        " cards, the account is too low, and a quantised variant or more GPUs are what helps"
        + (f"; {planned.note}" if planned.note else ""),
    )


def _planned(case: LogCase, plan: Plan, spec: str, verdict: str) -> Advice:
    values: dict[str, object] = {"engine": plan.engine.name}
    values |= {name: _value(plan, name) for name in _SHOWN}
    if plan.engine.on_torch:
        del values["communicator"]
    values["replicas"] = plan.parallel.replicas
    limits = plan.limits
    for name in ("max_dynamic_patch", "max_pixels_per_image"):
        if getattr(limits, name) is not None:
            values[name] = getattr(limits, name)
    return Advice(
        model=plan.model.name,
        on=spec,
        fits=plan.fits,
        verdict=verdict,
        settings=values if plan.fits else {},
        command="" if plan.serve is None else shlex.join(plan.serve.argv),
        note=_note(case, plan) if plan.fits else "",
        remedies=plan.remedies or _smaller(case),
    )


def _note(case: LogCase, plan: Plan) -> str:
    """A note that the plan's ratio and an older LMDeploy's cannot be compared, if both occur."""
    facts, version = case.facts, case.facts.subject.version
    older = is_legacy(version) if version else _RATIO in facts.subject.options
    older = older or bool(
        facts.first(KvBlocks) or facts.first(LegacyCuda) or facts.first(PeerMissing)
    )
    if not older or not plan.engine.of_lmdeploy:
        return ""
    return (
        f"these settings are for LMDeploy {REFERENCE}: its ratio is a share of what is free once"
        " model and vision tower are loaded; an older one's is a share of what was free there"
        " (before 0.2.2 of the whole card), and until 0.15 torch takes an image's memory out of the"
        " rest: the two ratios cannot be compared"
    )


def _value(plan: Plan, name: str) -> object:
    """The value of a setting; if the groups of engines differ, all their values in order."""
    values = [getattr(group.settings, name) for group in plan.group_plans()]
    return values[0] if len(set(values)) == 1 else " | ".join(map(str, values))


def _smaller(case: LogCase) -> tuple[Remedy, ...]:
    """A remedy that names the model's published 4-bit variant; empty if there is none."""
    assert case.model is not None
    try:
        variant = four_bit_variant(case.model)
    except TurbofitError:
        return ()
    if variant is None:
        return ()
    saved = case.model.weight_bytes - variant.weight_bytes
    return (
        Remedy(
            change=f"{variant.hub_id or variant.name} instead",
            effect=f"{format_bytes(saved)} less of weights, which the cache gets",
        ),
    )
