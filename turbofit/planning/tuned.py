"""What `turbofit tune` found, in plans: its settings where the promise is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.installation import installed
from turbofit.memory.calibrated import identity
from turbofit.observe.calibrations import pretends
from turbofit.observe.tuned import cards_of, promise_of, recall_tuned
from turbofit.planning.resolve import resolve
from turbofit.tuner.choose import best_plan

if TYPE_CHECKING:
    from turbofit.core.plan import Plan
    from turbofit.core.tuning import Tuning
    from turbofit.planning.request import PlanRequest
    from turbofit.tuner.resolved_request import ResolvedRequest

#: How the reason of a tuned plan begins.
_REASON: Final = "tuned: "

#: Options of LMDeploy that a launch may add to a request without making it another promise.
_BESIDE: Final = ("cache_max_entry_count", "communicator", "async_", "model_format", "dtype")


def with_tuned(
    plan: Plan, request: PlanRequest, resolved: ResolvedRequest, *, pretend: bool | None
) -> Plan:
    """The plan with the settings that were the fastest, where they fit and promise no less.

    Args:
        plan: the best by the forecast.
        request: what was asked.
        resolved: the same, with its model and its machine.
        pretend: as `planning.plan.plan` has it.
    """
    machine = resolved.machine
    if request.no_tuned or not plan.fits:
        return plan
    if pretend is None:
        pretend = pretends()
    cards = cards_of(machine)
    tunings = [
        tuning
        for tuning in recall_tuned(pretend=pretend)
        if tuning.gpus == cards and tuning.driver == str(machine.driver)
    ]
    if not tunings:
        return plan
    here = installed("lmdeploy")
    wanted = [tuning for tuning in tunings if _is_for(tuning, plan, request)]
    fresh = [tuning for tuning in wanted if here in (None, tuning.lmdeploy)]
    if fresh:
        return _applied(plan, request, resolved, fresh[0])
    if not wanted:
        return plan
    text = (
        f"it was tuned with LMDeploy {wanted[0].lmdeploy}, {here} is installed: turbofit tune "
        "again (its settings are not used)"
    )
    return replace(plan, warnings=(*plan.warnings, text))


def pinned(request: PlanRequest, plan: Plan) -> PlanRequest:
    """The request that gives a tuned plan's settings again; of another plan the request itself."""
    if not _reasons(plan) or plan.by_group:
        return request
    settings = plan.settings
    return request.changed(
        max_batch_size=settings.max_batch_size,
        max_prefill_token_num=settings.max_prefill_token_num,
        quant_policy=settings.quant_policy,
        enable_prefix_caching=settings.enable_prefix_caching,
        queue_images=plan.workload.queue_images,
    )


def still_tuned(replanned: Plan, plan: Plan) -> Plan:
    """A plan that was made again of a `pinned` request, with what a tuned plan says of itself."""
    reasons = _reasons(plan)
    if not reasons:
        return replanned
    return replace(replanned, reasons=(*replanned.reasons, *reasons))


def _reasons(plan: Plan) -> tuple[str, ...]:
    return tuple(text for text in plan.reasons if text.startswith(_REASON))


def _is_for(tuning: Tuning, plan: Plan, request: PlanRequest) -> bool:
    """Whether a tuning was made for this promise."""
    winner = tuning.winner
    if winner is None or tuning.model != identity(plan.model) or tuning.goal != request.goal:
        return False
    given = promise_of(request.given())
    more = {name for name in given if name not in tuning.promise}
    same = all(given.get(name) == value for name, value in tuning.promise.items())
    return same and more <= set(_BESIDE) and not more & set(winner.options)


def _applied(plan: Plan, request: PlanRequest, resolved: ResolvedRequest, tuning: Tuning) -> Plan:
    """The plan with the settings of a tuning."""
    winner = tuning.winner
    assert winner is not None
    assert winner.measured is not None
    rate, tried = winner.measured.requests_per_second, len(tuning.trials)
    text = (
        f"{rate:.2f} requests/s with LMDeploy {tuning.lmdeploy} on {tuning.created[:10]}, the best"
        f" of {tried} that turbofit tune tried here"
    )
    tuned = plan
    if winner.options:
        wanted = {**winner.options, "on": resolved.machine, "gpus": None}
        changed = request.changed(**wanted)
        try:
            tuned = best_plan(resolve(changed), changed.engine)
        except TurbofitError as exc:
            return _unused(plan, exc.message)
        if not tuned.fits:
            return _unused(plan, tuned.verdict)
        if not promises_no_less(tuned, plan):
            return _unused(plan, "with them it would promise a smaller context or image limit")
    if tuned.settings.quant_policy != plan.settings.quant_policy:
        text += f"; --quant-policy {tuned.settings.quant_policy} changes answers a little"
    reason = f"{_REASON}{text} (--no-tuned ignores it)"
    return replace(tuned, reasons=(*tuned.reasons, reason))


def promises_no_less(other: Plan, plan: Plan) -> bool:
    """Whether another plan keeps the context and the image limit of ``plan``."""
    least, limit = plan.limits.image_limit, other.limits.image_limit
    return other.settings.session_len >= plan.settings.session_len and (
        least is None or (limit is not None and limit >= least)
    )


def _unused(plan: Plan, why: str) -> Plan:
    text = f"the settings that turbofit tune found are not used: {why}"
    return replace(plan, warnings=(*plan.warnings, text))
