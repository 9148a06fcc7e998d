"""The best plan, with its reasons in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.footprint import Footprint
from turbofit.core.messages import BEYOND, QUEUED
from turbofit.core.plan import Candidate, Plan, may_evict
from turbofit.memory.engine import Engine
from turbofit.memory.known_bad import known_problems
from turbofit.tuner.engine_fit import EngineFit, fit_of
from turbofit.tuner.explain.footprint import engines_held, footprint_of, footprint_words
from turbofit.tuner.explain.limit_costs import limit_costs
from turbofit.tuner.explain.plan_document import (
    PlanDraft,
    document,
    group_words,
    verdict_of,
)
from turbofit.tuner.explain.reasons import reasons
from turbofit.tuner.explain.remedies import Remedies, remedies
from turbofit.tuner.explain.speed_remedies import speed_remedies
from turbofit.tuner.explain.unkept import beyond_model, unkept
from turbofit.tuner.explain.why_rejected import why_rejected
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of, vision_load_of
from turbofit.tuner.search.candidates import Evaluation, explain
from turbofit.tuner.search.search import Found

__all__ = ["make_plan", "plan_of"]

#: Rows of ``considered``; the chosen one is the first.
_MOST_CANDIDATES = 24


def make_plan(request: ResolvedRequest, engine: Engine) -> Plan:
    """Search, and say what was found.

    Raises:
        UsageError: something asked for cannot be used here at all.
    """
    return plan_of(fit_of(request, engine))


def plan_of(fit: EngineFit) -> Plan:
    """What was found, in words."""
    request, engine, found, accounts = fit.request, fit.engine, fit.found, fit.accounts
    best, problem = found.best, fit.host_problem
    largest = max(accounts, key=lambda account: account.units_per_forward)
    helps = Remedies((), ()) if fit.fits else remedies(fit)
    # What a person can change comes first: an option without which it fits is the cause.
    cause = f" with {' and '.join(helps.causes)}" if helps.causes else ""
    why_not = problem if best.fits and problem else _why_not(request, best, engine)
    verdict, fewer = _verdict(fit, f"{cause}: {why_not}"), fit.fewer
    parallel = _parallel_reason(request, found)
    footprint: Footprint | UnsetType = UNSET
    if request.least and fit.fits:
        servers = engines_held(request, best, engine, fit.host)
        footprint = footprint_of(request, accounts, servers)
        verdict += f", {footprint_words(footprint)}"
    parts = PlanDraft(
        groups=best.shape.groups,
        settings=best.settings,
        vision_load=fit.vision_load,
        limit=best.shape.limit,
        fits=fit.fits,
        verdict=verdict,
        parallel_reason=f"{parallel}; {fewer}" if fewer else parallel,
        host=fit.host,
        throughput=fit.throughput if fit.fits else None,
        considered=_considered(request, found, engine),
        reasons=(*([fewer] if fewer else []), *reasons(request, found, largest, engine)),
        warnings=(*_beside(fit), *_warnings(request, found, engine)),
        remedies=helps.remedies if not fit.fits else tuple(speed_remedies(request, found, engine)),
        at_once=_at_once(request, best),
        held=None if request.promised_requests is None else best.held,
        limit_costs=tuple(limit_costs(request, best, engine)) if fit.fits else (),
    )
    return replace(document(request, parts, accounts, engine), footprint=footprint)


def _at_once(request: ResolvedRequest, best: Evaluation) -> tuple[float, ...]:
    """Requests in each group where cards are unequal."""
    if not best.parts:
        return ()
    requests = request.workload.concurrency
    return tuple(best.of_group(group).shape.requests(requests) for group in best.shape.groups)


def _verdict(fit: EngineFit, why_not: str) -> str:
    request, best = fit.request, fit.found.best
    if not fit.fits:
        return f"does not fit: {request.model.name}{why_not}"
    groups = best.shape.groups
    each = [best.of_group(group).kv_tokens for group in groups]
    shown = fit.accounts if best.parts else fit.accounts[:1]
    return verdict_of(request, groups, shown, each, best.vision_load)


def _considered(request: ResolvedRequest, found: Found, engine: Engine) -> tuple[Candidate, ...]:
    """The chosen shape, then the best of the others with the reason why each was rejected."""
    chosen = found.best
    rest = [one for one in found.evaluations if one is not chosen]
    rest.sort(key=lambda one: (one.fits, one.rank if one.fits else (-one.short,)), reverse=True)
    first: dict[tuple[int, int], int] = {}
    for place, one in enumerate(rest):  # one row at least of every degree and count
        first.setdefault((one.shape.tp, one.shape.replicas), place)
    others = set(range(len(rest))) - set(first.values())
    shown = sorted([*first.values(), *sorted(others)][: _MOST_CANDIDATES - 1])
    rows = [chosen.candidate(_why_not(request, chosen, engine))]
    for one in (rest[place] for place in shown):
        why_not = why_rejected(request, chosen, one) if one.fits else _why_not(request, one, engine)
        rows.append(one.candidate(why_not))
    return tuple(rows)


def _why_not(request: ResolvedRequest, evaluation: Evaluation, engine: Engine) -> str:
    return explain(request, evaluation, evaluation.settings.dtype, engine)


def _parallel_reason(request: ResolvedRequest, found: Found) -> str:
    best, shape = found.best, found.best.shape
    if request.tp is not None and request.replicas is not None:
        return "as asked"
    if not best.fits:
        return "the closest to fitting"
    goal = {
        "throughput": "the most requests per second by the forecast",
        "latency": "the shortest answer by the forecast",
        "context": "the most KV tokens for one request",
    }[request.workload.goal]
    if request.least:
        goal = "the least memory"
    sizes = sorted(Counter(map(len, shape.groups)).items())
    engines = " and ".join(f"{n} x {f'tp {tp}' if tp > 1 else 'one GPU each'}" for tp, n in sizes)
    return f"{engines}: {goal} of {len(found.evaluations)} shapes, the promises kept first"


def _beside(fit: EngineFit) -> Iterator[str]:
    """Given values that the plan does not keep in full."""
    if not fit.fits:
        return
    yield from unkept(
        fit.request,
        session_len=fit.settings.session_len,
        kv_tokens=fit.tokens,
    )
    yield from beyond_model(fit.request, fit.settings.session_len)


def _warnings(request: ResolvedRequest, found: Found, engine: Engine) -> Iterator[str]:
    shape = found.best.shape
    if found.best.fits:
        yield from _known_problems(request, found, engine)
    used = {index for group in shape.groups for index in group}
    idle = [gpu for gpu in request.visible if gpu.index not in used]
    if idle and found.best.fits and not request.least:
        names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in idle)
        yield f"not used: {names}"
    for group in shape.groups if found.best.fits else ():
        if len({request.machine.gpu(index).name for index in group}) > 1:
            yield (
                f"{group_words(request, group)} is split over unequal cards, as you asked: the one"
                " with the least free memory sizes the cache of all, the slowest one paces them"
            )
    if found.best.fits and shape.units_per_forward is not None:
        yield QUEUED
        sets = found.best.parts or (found.best,)
        if any(may_evict(one.settings, one.kv_tokens) for one in sets):
            yield (
                "image requests that state max_tokens run beside each other while the cache holds"
                " them all; others wait for the end of the one before"
            )
    requested_load = vision_load_of(request, request.requested_limit)
    if requested_load.units_per_image and found.best.fits:
        yield (
            f"{BEYOND}: turbofit serve and turbofit.pipeline hold them, LMDeploy itself lets any"
            " client exceed them"
        )
    if found.best.fits:
        each = [part.settings for part in found.best.parts or (found.best,)]
        yield from dict.fromkeys(text for one in each for text in engine.warnings(one))
    if request.model.needs_remote_code:
        yield "LMDeploy runs the checkpoint's own code for it: --trust-remote-code is set"


def _known_problems(request: ResolvedRequest, found: Found, engine: Engine) -> Iterator[str]:
    """What is known to go wrong in some group, each once."""
    said: dict[str, None] = {}
    for group in found.best.shape.groups:
        gpus = [request.machine.gpu(index) for index in group]
        part = found.best.of_group(group)
        launch = launch_of(request, part.settings, gpus, part.vision_load)
        for known in known_problems(launch, engine.name, engine.version):
            said[known.warning] = None
    yield from said
