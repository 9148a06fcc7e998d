"""What would make a fallback plan fit, each computed by searching again with the change."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Remedy
from turbofit.tuner.explain.other_machines import MORE_GPUS, stopped, with_more_gpus
from turbofit.tuner.explain.remedies import left_to_turbofit
from turbofit.tuner.fallback.search import search
from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["fallback_remedies"]


def fallback_remedies(request: ResolvedRequest) -> tuple[Remedy, ...]:
    """Single changes that make it fit, cheapest first."""
    found, fits_with_gpus = [], False
    for change, changed in _changes(request):
        buys = changed.machine.name == MORE_GPUS
        if buys and fits_with_gpus:
            continue  # fewer such cards do already
        try:
            chosen = search(changed)
        except TurbofitError:
            continue
        if not chosen.fits:
            continue
        fits_with_gpus = fits_with_gpus or buys
        off = len(chosen.placement.offloaded)
        effect = f"fits: one request of {chosen.session_len:,} tokens at a time"
        if off:
            effect += f", {off} decoder layers in host memory (slow)"
        found.append(Remedy(change=change, effect=effect))
    return tuple(found)


def _changes(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest]]:
    """The change, and what is asked then."""
    workload = request.workload
    yield from ((one.change, one.request) for one in left_to_turbofit(request))
    if workload.context is not None:
        shorter = replace(workload, context=None)
        yield "leave --context to what fits", replace(request, workload=shorter)
    if workload.images > 1:
        yield "--images 1", replace(request, workload=replace(workload, images=1))
    rule, limit = request.model.image_rule, request.fixed_limit
    if rule is not None and limit is not None and limit > 1:
        yield f"{rule.limit_option} {limit // 2}", request.with_limit(limit // 2)
    if request.replicas is not None and request.replicas > 1:
        yield "--replicas 1", replace(request, replicas=None)
    if request.tp is not None:
        yield "leave --tp to turbofit", replace(request, tp=None)
    yield from stopped(request)
    yield from with_more_gpus(request)
