"""What speed would gain by a smaller promise, with its figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Remedy
from turbofit.core.units import three_digits
from turbofit.memory.engine import Engine
from turbofit.model.presets import preset_of
from turbofit.tuner.engine_fit import fit_on_host
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import Evaluation
from turbofit.tuner.search.context import shortest_context
from turbofit.tuner.search.search import Found
from turbofit.tuner.speed.throughput import request_tokens

__all__ = ["speed_remedies"]

#: A gain that is less than this share is within what the forecast knows.
_WORTH_SAYING: Final = 0.1
#: Contexts that are tried, the longest first.
_SHORTER: Final = (16384, 8192, 4096)


def speed_remedies(request: ResolvedRequest, found: Found, engine: Engine) -> Iterator[Remedy]:
    """What a smaller promise would give where it gives clearly more, computed by planning again.

    Args:
        request: what was asked.
        found: what the search found; promises came before speed in it.
        engine: the engine generation.
    """
    if not found.best.fits or request.workload.goal == "context" or request.least:
        return
    yield from _pages(request, found.best, engine)
    if not request.context_given:
        yield from _shorter(request, found, engine)


def _pages(request: ResolvedRequest, best: Evaluation, engine: Engine) -> Iterator[Remedy]:
    """Images as the tool of a reader of documents sends them."""
    workload = request.workload
    limited = workload.image_size is not None or request.fixed_limit is not None
    if limited or not best.vision_load.units_per_image:
        return
    preset = preset_of(request.model)
    page = preset.page if preset is not None else None
    if page is None:
        return
    change, size = f"--image-size {page.width}x{page.height}", (page.width, page.height)
    workload = replace(workload, image_size=size)
    if not request.context_given:
        change += f" --context {page.context}"
        workload = replace(workload, context=page.context)
    try:
        made = fit_on_host(replace(request, workload=workload), engine)
    except TurbofitError:
        return
    smaller = made.found.best
    if made.fits and smaller.score >= best.score * (1 + _WORTH_SAYING):
        effect = f"{_gain(request, best, smaller)}, for pages as {page.tool} sends them"
        yield Remedy(change=change, effect=effect)


def _shorter(request: ResolvedRequest, found: Found, engine: Engine) -> Iterator[Remedy]:
    """A shorter context with which another shape serves clearly more."""
    best, workload = found.best, request.workload
    least = shortest_context(best.vision_load)
    rivals = [one for one in found.evaluations if one.fits and one.served == best.served]
    left_out = any(one.settings.session_len < best.settings.session_len for one in rivals)
    held = best.kv_tokens // request_tokens(found.requested_load)
    if not left_out and held <= best.settings.max_batch_size:
        return  # the context left out no shape, and no requests
    for context in _SHORTER:
        if not least <= context < best.settings.session_len:
            continue
        changed = replace(request, workload=replace(workload, context=context))
        try:
            made = fit_on_host(changed, engine)
        except TurbofitError:
            return
        shorter = made.found.best
        whole = made.fits and shorter.served == best.served
        if whole and shorter.score >= best.score * (1 + _WORTH_SAYING):
            yield Remedy(change=f"--context {context}", effect=_gain(request, best, shorter))
            return


def _gain(request: ResolvedRequest, best: Evaluation, shorter: Evaluation) -> str:
    if request.workload.goal == "latency":
        return f"an answer in {1 / shorter.score:.1f} s by the forecast, not {1 / best.score:.1f}"
    now = three_digits(best.score)
    return f"{three_digits(shorter.score)} requests/s by the forecast, not {now}"
