"""What speed would gain by a smaller promise, with its figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Remedy
from turbofit.memory.engine import Engine
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import Evaluation
from turbofit.tuner.search.context import shortest_context
from turbofit.tuner.search.search import Found, search
from turbofit.tuner.speed.throughput import request_tokens

__all__ = ["speed_remedies"]

#: A gain that is less than this share is within what the forecast knows.
_WORTH_SAYING: Final = 0.1
#: Contexts that are tried, the longest first.
_SHORTER: Final = (16384, 8192, 4096)


def speed_remedies(request: ResolvedRequest, found: Found, engine: Engine) -> Iterator[Remedy]:
    """A shorter context with which another shape serves clearly more, computed by planning again.

    Args:
        request: what was asked.
        found: what the search found; promises came before speed in it.
        engine: the engine generation.
    """
    best, workload = found.best, request.workload
    if not best.fits:
        return
    if request.context_given or workload.goal == "context" or request.least:
        return
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
            shorter = search(changed, engine).best
        except TurbofitError:
            return
        whole = shorter.fits and shorter.served == best.served
        if whole and shorter.score >= best.score * (1 + _WORTH_SAYING):
            yield Remedy(change=f"--context {context}", effect=_gain(request, best, shorter))
            return


def _gain(request: ResolvedRequest, best: Evaluation, shorter: Evaluation) -> str:
    if request.workload.goal == "latency":
        return f"an answer in {1 / shorter.score:.1f} s by the forecast, not {1 / best.score:.1f}"
    return f"{shorter.score:.3g} requests/s by the forecast, not {best.score:.3g}"
