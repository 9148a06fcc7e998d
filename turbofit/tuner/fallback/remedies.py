"""What would make a fallback plan fit, each computed by searching again with the change."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Remedy
from turbofit.tuner.explain.other_machines import MORE_GPUS, larger, stopped, with_more_gpus
from turbofit.tuner.explain.remedies import Change, Remedies, left_to_turbofit
from turbofit.tuner.fallback.messages import at_once
from turbofit.tuner.fallback.search import Chosen, search
from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["fallback_remedies"]


def fallback_remedies(request: ResolvedRequest, closest: Chosen) -> Remedies:
    """Single changes that make it fit, cheapest first; ``closest`` is what was found without."""
    found, causes = list[Remedy](), list[str]()
    for change, changed, released in _changes(request, closest):
        if found and changed.machine.name == MORE_GPUS:
            continue  # fewer such cards do already, or what costs nothing
        try:
            chosen = search(changed)
        except TurbofitError:
            continue
        if not chosen.keeps(changed):
            continue
        off = len(chosen.placement.offloaded)
        effect = f"fits: {at_once(chosen)} {chosen.session_len:,} tokens at a time"
        if off:
            effect += f", {off} decoder layers in host memory (slow)"
        found.append(Remedy(change=change, effect=effect))
        causes += [released] if released else []
    return Remedies(tuple(found), tuple(causes))


def _changes(request: ResolvedRequest, closest: Chosen) -> Iterator[Change]:
    """Single changes, cheapest first."""
    workload = request.workload
    yield from left_to_turbofit(request)
    if workload.context is not None:
        yield Change(
            "leave --context to what fits",
            replace(request, workload=replace(workload, context=None)),
            f"--context {workload.context}",
        )
    if workload.images > 1:
        fewer = replace(workload, images=1)
        yield Change("--images 1", replace(request, workload=fewer), f"--images {workload.images}")
    rule, limit = request.model.image_rule, request.fixed_limit
    if rule is not None and limit is not None and limit > 1:
        yield Change(
            f"{rule.limit_option} {limit // 2}",
            request.with_limit(limit // 2),
            f"{rule.limit_option} {limit}",
        )
    if request.replicas is not None and (request.replicas > 1 or closest.fits):
        free = "leave --replicas to turbofit" if closest.fits else "--replicas 1"
        alone = replace(request, replicas=None)
        yield Change(free, alone, f"--replicas {request.replicas}")
    if request.tp is not None:
        yield Change("leave --tp to turbofit", replace(request, tp=None), f"--tp {request.tp}")
    yield from (Change(*change) for change in (*stopped(request), *with_more_gpus(request)))
    if closest.fits:  # and answers fewer at once than were asked for
        copies = len(closest.copies)
        less = replace(request, workload=replace(workload, concurrency=copies))
        wanted = f"--concurrency {workload.concurrency}"
        yield Change(f"--concurrency {copies}", less, wanted)
        return
    yield from (Change(*change) for change in larger(request))
