"""Checks a second plan against a first: with more memory, a smaller request, or ``--least``."""

from __future__ import annotations

from typing import Final

from bench.plans.requests import Pair, Request
from turbofit.core.plan import Plan
from turbofit.memory.account import RATIO_STEPS
from turbofit.planning.reasons import FAR

#: Tokens by which rounding to blocks may shorten a context.
_ROUNDING: Final = 64
#: Share of a value that a batch may cost: it is the smallest with nearly the best rate.
_SHARE: Final = 0.01
#: The context that is promised where nobody asks for another.
_ENOUGH: Final = 32_768


def shrinks(pair: Pair, less: Plan, more: Plan) -> str:
    """Return which promise is smaller in the second plan; empty if none is.

    Values are not compared where loads or engines differ: TurboMind is preferred to the PyTorch
    engine where both keep the promises, and the forecast does not tell their speeds apart. Where
    TurboMind serves only with more, images and context may be smaller, but not by a third.
    """
    if not less.fits:
        return ""
    if not more.fits:
        return f"does not fit any more: {more.verdict}"
    kept = FAR if more.backend.name == "turbomind" != less.backend.name else 1
    limits = [plan.promise.limits.units_per_image for plan in (less, more)]
    if limits[0] != limits[1]:
        smaller = limits[1] < limits[0] * kept
        return f"images of {limits[0]} units, then {limits[1]}" if smaller else ""
    # Images that need a longer context get it, which is no promise to fewer of them.
    contexts = [plan.engines[0].settings.session_len for plan in (less, more)]
    if pair.kind == "images":
        contexts = [min(context, _ENOUGH) for context in contexts]
    if pair.kind != "context" and abs(contexts[0] - contexts[1]) > _ROUNDING:
        shorter = contexts[1] < contexts[0] * kept
        return f"a context of {contexts[0]}, then {contexts[1]}" if shorter else ""
    values = [plan.considered[0].score if plan.considered else 0.0 for plan in (less, more)]
    if pair.kind == "concurrency" or less.backend != more.backend:
        return ""
    before, after = values
    if before is None or after is None:  # the plan does not show the forecast that ranked it
        return ""
    if after < before * (1 - _SHARE):
        return f"a value of {before:.4g}, then {after:.4g}"
    return ""


def taken(plan: Plan) -> int:
    """Return the most bytes that the engines of a plan hold on all GPUs."""
    return sum(max(gpu.peak, gpu.load_peak) - gpu.used for gpu in plan.ledgers)


def least_breaks(request: Request, whole: Plan, least: Plan) -> str:
    """Return the promise that a plan with ``--least`` breaks; empty if it keeps all promises."""
    options = request.options
    if not least.fits:
        return f"does not fit: {least.verdict}"
    if least.promise.limits.units_per_image < whole.promise.limits.units_per_image:
        return f"images of {least.promise.limits.units_per_image} units"
    if least.promise.context < options.get("context", 0):
        return f"a context of {least.promise.context}"
    if least.requests_at_once < options.get("concurrency", 1):
        return f"{least.requests_at_once} requests at once"
    # Where not all of them are held at once, a step of the ratio may fill a little more.
    step = sum(gpu.total for gpu in least.ledgers) // RATIO_STEPS if least.may_evict() else 0
    if taken(least) > taken(whole) + step:
        return f"takes {taken(least):,} bytes, without --least {taken(whole):,}"
    return ""
