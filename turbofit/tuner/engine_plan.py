"""The best plan, with its reasons in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.footprint import Footprint
from turbofit.core.messages import BEYOND, OWN_CODE, QUEUED
from turbofit.core.plan import Candidate, Plan, may_evict
from turbofit.memory.account import Engine
from turbofit.memory.known_bad import known_problems
from turbofit.tuner.explain.plan_document import (
    document,
    engines_held,
    footprint_of,
    footprint_words,
    group_words,
    verdict_of,
)
from turbofit.tuner.explain.reasons import (
    beyond_model,
    limit_costs,
    reasons,
    unkept,
    usual_image,
    why_rejected,
)
from turbofit.tuner.explain.remedies import Remedies, remedies, speed_remedies
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of
from turbofit.tuner.search.candidates import explain
from turbofit.tuner.search.search import EngineFit, search

__all__ = ["make_plan", "plan_of", "why_not"]

#: Rows of ``considered``; the chosen one is the first.
_MOST_CANDIDATES = 24


def make_plan(request: ResolvedRequest, engine: Engine) -> Plan:
    """Search, and say what was found.

    Raises:
        UsageError: something asked for cannot be used here at all.
    """
    return plan_of(search(request, engine))


def plan_of(fit: EngineFit) -> Plan:
    """What was found, in words."""
    request, best, accounts = fit.request, fit.best, fit.accounts
    helps = Remedies((), ()) if fit.fits else remedies(fit)
    footprint: Footprint | UnsetType = UNSET
    groups = best.shape.groups
    if fit.fits:
        tokens = [best.of_group(group).kv_tokens for group in groups]
        shown = accounts if best.parts else accounts[:1]
        verdict = verdict_of(request, groups, shown, tokens, best.vision_load)
        if request.least:
            servers = engines_held(request, best, fit.engine, fit.host)
            footprint = footprint_of(request, accounts, servers)
            verdict += f", {footprint_words(footprint)}"
    else:
        # What a person can change comes first: an option without which it fits is the cause.
        cause = f" with {' and '.join(helps.causes)}" if helps.causes else ""
        verdict = f"does not fit: {request.model.name}{cause}: {why_not(fit)}"
    requests = request.workload.concurrency
    made = document(
        request,
        fit.engine,
        accounts,
        fits=fit.fits,
        verdict=verdict,
        parallel_reason=_parallel_reason(fit),
        host=fit.host,
        settings=best.settings,
        vision_load=best.vision_load,
        limit=best.shape.limit,
        held=None if request.promised_requests is None else best.held,
        at_once=[best.of_group(group).shape.requests(requests) for group in groups]
        if best.parts
        else (),
    )
    largest = max(accounts, key=lambda account: account.units_per_forward)
    return replace(
        made,
        throughput=fit.throughput if fit.fits else None,
        considered=_considered(fit),
        reasons=(*([fit.fewer] if fit.fewer else []), *reasons(fit, largest)),
        warnings=(*made.warnings, *_warnings(fit)),
        remedies=tuple(speed_remedies(fit)) if fit.fits else helps.remedies,
        limit_costs=tuple(limit_costs(request, best, fit.engine)) if fit.fits else (),
        usual_image=usual_image(fit) if fit.fits else UNSET,
        footprint=footprint,
    )


def why_not(fit: EngineFit) -> str:
    """Why it does not fit, in words."""
    if fit.best.fits and fit.host_problem:
        return fit.host_problem
    return explain(fit.request, fit.best, fit.engine)


def _considered(fit: EngineFit) -> tuple[Candidate, ...]:
    """The chosen shape, then the best of the others with the reason why each was rejected."""
    request, chosen, engine = fit.request, fit.best, fit.engine
    rest = [one for one in fit.evaluations if one is not chosen]
    rest.sort(key=lambda one: (one.fits, one.rank if one.fits else (-one.short,)), reverse=True)
    first: dict[tuple[int, int], int] = {}
    for place, one in enumerate(rest):  # one row at least of every degree and count
        first.setdefault((one.shape.tp, one.shape.replicas), place)
    others = set(range(len(rest))) - set(first.values())
    shown = sorted([*first.values(), *sorted(others)][: _MOST_CANDIDATES - 1])
    rows = [chosen.candidate(explain(request, chosen, engine))]
    for one in (rest[place] for place in shown):
        why = why_rejected(request, chosen, one) if one.fits else explain(request, one, engine)
        rows.append(one.candidate(why))
    return tuple(rows)


def _parallel_reason(fit: EngineFit) -> str:
    request, best = fit.request, fit.best
    fewer = f"; {fit.fewer}" if fit.fewer else ""
    if request.tp is not None and request.replicas is not None:
        return f"as asked{fewer}"
    if not best.fits:
        return f"the closest to fitting{fewer}"
    goal = {
        "throughput": "the most requests per second by the forecast",
        "latency": "the shortest answer by the forecast",
        "context": "the most KV tokens for one request",
    }[request.workload.goal]
    if request.least:
        goal = "the least memory"
    sizes = sorted(Counter(map(len, best.shape.groups)).items())
    engines = " and ".join(f"{n} x {f'tp {tp}' if tp > 1 else 'one GPU each'}" for tp, n in sizes)
    return f"{engines}: {goal} of {len(fit.evaluations)} shapes, the promises kept first{fewer}"


def _warnings(fit: EngineFit) -> Iterator[str]:
    """What a person should know; values that are not kept in full first."""
    request, best = fit.request, fit.best
    if fit.fits:
        yield from unkept(request, best.settings.session_len, fit.tokens)
        yield from beyond_model(request, best.settings.session_len)
    if best.fits:
        yield from _of_fitting(fit)
    if request.model.needs_remote_code:
        yield OWN_CODE


def _of_fitting(fit: EngineFit) -> Iterator[str]:
    """What is known to go wrong, idle and unequal cards, and what only turbofit's gateway holds."""
    request, best, shape, engine = fit.request, fit.best, fit.best.shape, fit.engine
    known: dict[str, None] = {}
    for group in shape.groups:
        gpus, part = [request.machine.gpu(index) for index in group], best.of_group(group)
        launch = launch_of(request, part.settings, gpus, part.vision_load)
        problems = known_problems(launch, engine.name, engine.version)
        known.update(dict.fromkeys(problem.warning for problem in problems))
    yield from known
    used = {index for group in shape.groups for index in group}
    idle = [gpu for gpu in request.visible if gpu.index not in used]
    if idle and not request.least:
        names = ", ".join(f"GPU {gpu.index} ({gpu.name})" for gpu in idle)
        yield f"not used: {names}"
    for group in shape.groups:
        if len({request.machine.gpu(index).name for index in group}) > 1:
            yield (
                f"{group_words(request, group)} is split over unequal cards, as you asked: the one"
                " with the least free memory sizes the cache of all, the slowest one paces them"
            )
    if shape.units_per_forward is not None:
        yield QUEUED
        if any(may_evict(part.settings, part.kv_tokens) for part in best.sets):
            yield (
                "image requests that state max_tokens run beside each other while the cache holds"
                " them all; others wait for the end of the one before"
            )
    if fit.requested_load.units_per_image:
        yield (
            f"{BEYOND}: turbofit serve and turbofit.pipeline hold them, LMDeploy itself lets any"
            " client exceed them"
        )
    yield from dict.fromkeys(text for part in best.sets for text in engine.warnings(part.settings))
