"""What would make a fallback plan fit, each computed by searching again with the change."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.machine import Holder
from turbofit.core.plan import Remedy
from turbofit.core.struct import known
from turbofit.core.units import format_bytes
from turbofit.tuner.explain.with_more_gpus import bought
from turbofit.tuner.fallback.search import search
from turbofit.tuner.resolved_request import ResolvedRequest

__all__ = ["fallback_remedies"]


def fallback_remedies(request: ResolvedRequest) -> tuple[Remedy, ...]:
    """Single changes that make it fit, cheapest first."""
    found, fits_with_gpus = [], False
    for change, changed, buys in _changes(request):
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


def _changes(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest, bool]]:
    """The change, what is asked then, and whether it buys GPUs."""
    workload = request.workload
    for name in request.fixed:
        rest = {key: value for key, value in request.fixed.items() if key != name}
        yield f"leave --{name.replace('_', '-')} to turbofit", replace(request, fixed=rest), False
    if request.budget is not None:
        yield "leave --budget out", replace(request, budget=None), False
    if workload.context is not None:
        shorter = replace(workload, context=None)
        yield "leave --context to what fits", replace(request, workload=shorter), False
    if workload.images > 1:
        yield "--images 1", replace(request, workload=replace(workload, images=1)), False
    rule, limit = request.model.image_rule, request.fixed_limit
    if rule is not None and limit is not None and limit > 1:
        yield f"{rule.limit_option} {limit // 2}", request.with_limit(limit // 2), False
    if request.replicas is not None and request.replicas > 1:
        yield "--replicas 1", replace(request, replicas=None), False
    if request.tp is not None:
        yield "leave --tp to turbofit", replace(request, tp=None), False
    yield from _stopped(request)
    for change, more in bought(request):
        yield change, more, True


def _stopped(request: ResolvedRequest) -> Iterator[tuple[str, ResolvedRequest, bool]]:
    """The largest holder on any GPU, gone."""
    held: list[tuple[int, int, Holder]] = [
        (known(holder.bytes, 0), gpu.index, holder)
        for gpu in request.visible
        for holder in gpu.holders
        if known(holder.bytes, 0) > 0 and holder.pid != "NA"
    ]
    if not held:
        return
    freed, index, holder = max(held, key=lambda one: one[0])
    gpus = tuple(
        replace(gpu, used=known(gpu.used, 0) - freed, free=known(gpu.free, 0) + freed)
        if gpu.index == index
        else gpu
        for gpu in request.machine.gpus
    )
    change = f"stop {holder.name}[{holder.pid}] on GPU {index} ({format_bytes(freed)})"
    yield change, replace(request, machine=replace(request.machine, gpus=gpus)), False
