"""Stores the results of `turbofit tune`, and uses them in plans with the same promise.

Results of pretend GPUs are stored separately: a real plan never reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.installation import installed
from turbofit.core.machine import Machine
from turbofit.core.messages import QUEUED
from turbofit.core.plan import SPECULATIVE, Plan, alike
from turbofit.core.tuning import TUNE_SCHEMA, Tuning
from turbofit.machine.learned import all_learned, learned
from turbofit.memory.calibrated import identity
from turbofit.memory.engines import engine_of
from turbofit.planning.calibrations import pretends
from turbofit.planning.choose import best_plan, plan_of
from turbofit.planning.own_drafts import DRAFTS
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.search.search import search

#: How the reason of a tuned plan begins.
_REASON: Final = "tuned: "

#: The settings that a tuning may change.
_TUNED: Final = (
    "max_batch_size", "max_prefill_token_num", "quant_policy", "enable_prefix_caching",
)  # fmt: skip
#: Options of LMDeploy that a launch may add without changing the promise.
_BESIDE: Final = ("cache_max_entry_count", "communicator", "async_", "model_format", "dtype")
#: Options that do not influence which settings are best.
_NO_PROMISE: Final = (
    "model",
    "revision",
    "on",
    "gpus",
    "no_tuned",
    "margin",
    "goal",
    "prompt_tokens",
    "output_tokens",
)


def with_tuned(
    plan: Plan, request: PlanRequest, resolved: ResolvedRequest, *, pretend: bool | None
) -> Plan:
    """Return the plan with the fastest measured settings, if they fit and promise no less.

    ``pretend`` is as in `planning.plan.plan`.
    """
    if request.no_tuned or not plan.fits:
        return plan
    cards = (cards_of(resolved.machine), str(resolved.machine.driver))
    wanted = [
        tuning
        for tuning in recall_tuned(pretend=pretends() if pretend is None else pretend)
        if (tuning.gpus, tuning.driver) == cards and _is_for(tuning, plan, request)
    ]
    if not wanted:
        return plan
    here = installed("lmdeploy")
    if fresh := [tuning for tuning in wanted if here in (None, tuning.lmdeploy)]:
        return _applied(plan, request, resolved, fresh[0])
    text = (
        f"the tuned settings are of LMDeploy {wanted[0].lmdeploy}, and {here} is installed: they"
        " are not used until turbofit tune runs again"
    )
    return replace(plan, warnings=(*plan.warnings, text))


def pinned(request: PlanRequest, plan: Plan) -> PlanRequest:
    """Return the request with a tuned plan's settings as options.

    The request is unchanged if the plan is not tuned, or if its engines are not alike.
    """
    is_tuned = any(text.startswith(_REASON) for text in plan.reasons)
    if not is_tuned or len(alike(plan.engines)) > 1:
        return request
    settings = {name: getattr(plan.engines[0].settings, name) for name in _TUNED}
    drafts = {name: getattr(plan.engines[0].settings, name) for name in SPECULATIVE}
    settings |= {name: None if value is UNSET else value for name, value in drafts.items()}
    return request.changed(**settings, queue_images=plan.workload.queue_images)


def same_shape(
    request: PlanRequest, plan: Plan, ratios: Mapping[int, float], **margin: Any
) -> Plan:
    """Plan the groups of a plan again, after a rehearsal or a start has measured its memory.

    A tuned plan keeps its tuned settings and their reason, a plan with a draft its numbers for
    other drafts. ``ratios`` has the highest cache ratio that a rehearsal allows on each GPU, by
    index. ``margin`` has the fields of the `Margin` that change: ``rehearsed``, or ``over`` after a
    start.

    The promise of the plan is kept. If its groups cannot, the plan has a smaller promise, and a
    warning that says so.
    """
    resolved, engine = resolve(pinned(request, plan)), engine_of(plan)
    cached = plan.prefix_caching
    shape = replace(
        resolved,
        ratio_caps=dict(ratios),
        groups=plan.groups,
        prefix_caching=cached,
        may_queue=not cached or QUEUED in plan.warnings,
        margin=replace(resolved.margin, **margin),
    )
    again = plan_of(search(shape.keeping(plan.promise), engine)).document
    if not again.fits:
        again = plan_of(search(shape, engine)).document
        why = plan.promise.why_broken(again.promise, plan.model.image_rule)
        if again.fits and why:
            text = f"the plan before this one promised more than its memory allows: it now {why}"
            again = replace(again, warnings=(*again.warnings, text))
    backend = replace(again.backend, reason=plan.backend.reason)
    kept = tuple(text for text in plan.reasons if text.startswith((_REASON, DRAFTS)))
    return replace(again, backend=backend, reasons=(*again.reasons, *kept))


def _is_for(tuning: Tuning, plan: Plan, request: PlanRequest) -> bool:
    """Return whether a tuning was made for the promise of this plan and request."""
    winner = tuning.winner
    if winner is None or tuning.model != identity(plan.model) or tuning.goal != request.goal:
        return False
    given = promise_of(request.given())
    more = {name for name in given if name not in tuning.promise}
    same = all(given.get(name) == value for name, value in tuning.promise.items())
    return same and more <= set(_BESIDE) and not more & set(winner.options)


def _applied(plan: Plan, request: PlanRequest, resolved: ResolvedRequest, tuning: Tuning) -> Plan:
    """Return the plan with the settings of a tuning.

    If these settings do not keep the plan's promise, return the old plan with a warning.
    """
    winner = tuning.winner
    assert winner is not None
    assert winner.measured is not None
    rate, tried = winner.measured.requests_per_second, sum(not t.again for t in tuning.trials)
    text = (
        f"{rate:.2f} requests/s with LMDeploy {tuning.lmdeploy} on {tuning.created[:10]}, the best"
        f" of {tried} that turbofit tune tried here"
    )
    tuned = plan
    if winner.options:
        wanted = {**winner.options, "on": resolved.machine, "gpus": None}
        changed = request.changed(**wanted)
        try:
            tuned = best_plan(resolve(changed).keeping(plan.promise), changed.engine)
        except TurbofitError as exc:
            return _unused(plan, exc.message)
        if not tuned.fits:
            return _unused(plan, tuned.verdict)
    policy = tuned.engines[0].settings.quant_policy
    if policy != plan.engines[0].settings.quant_policy:
        text += f"; --quant-policy {policy} changes answers a little"
    reason = f"{_REASON}{text} (--no-tuned ignores it)"
    return replace(tuned, reasons=(*tuned.reasons, reason))


def _unused(plan: Plan, why: str) -> Plan:
    text = f"the settings that turbofit tune found are not used: {why}"
    return replace(plan, warnings=(*plan.warnings, text))


def cards_of(machine: Machine) -> tuple[str, ...]:
    """Return the sorted names of the visible cards."""
    return tuple(sorted(machine.gpu(index).name for index in machine.visible))


def promise_of(given: Mapping[str, object]) -> dict[str, object]:
    """Return the request's given options that a tuning depends on."""
    options = plain({name: value for name, value in given.items() if name not in _NO_PROMISE})
    return {name: value for name, value in options.items() if (name, value) != ("engine", "auto")}


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """Return options in the form of a stored document, to compare them with a document."""
    options: dict[str, object] = json.loads(json.dumps(values, default=str, sort_keys=True))
    return options


def keep_tuned(tuning: Tuning) -> Path:
    """Store a tuning for later plans, and return the file's path.

    An older tuning of the same model and promise, under the same conditions, is replaced.

    Raises:
        OSError: the state folder cannot be made.
        UsageError: the file cannot be written.
    """
    facts = (
        tuning.gpus, tuning.driver, tuning.lmdeploy, tuning.promise, tuning.load, tuning.goal,
        tuning.slo,
    )  # fmt: skip
    return learned("tuned", Tuning, tuning.model, *facts, pretend=tuning.pretend).save(tuning)


def recall_tuned(*, pretend: bool) -> tuple[Tuning, ...]:
    """Return all stored tunings, newest first; unreadable tunings are left out."""
    kept = all_learned("tuned", Tuning, pretend=pretend)
    tunings = [it for it in kept if it.schema == TUNE_SCHEMA and it.pretend == pretend]
    return tuple(sorted(tunings, key=lambda tuning: tuning.created, reverse=True))
