"""Chooses the engine that serves more of a request, and makes the plan with it.

Usually this engine is TurboMind, which decodes faster. But TurboMind needs more memory while it
loads: on some cards only the PyTorch engine starts, admits the images that were asked for, or far
larger ones than TurboMind, or holds the context. If the least memory is wished, the engine that
takes less memory is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, TurbofitError
from turbofit.core.forecast import UsualImage
from turbofit.core.messages import BEYOND, OWN_CODE, QUEUED, counted
from turbofit.core.plan import Candidate, Plan, Remedy, may_evict
from turbofit.core.promise import Promise
from turbofit.memory.account import Engine, capability_of
from turbofit.memory.engines import (
    ENGINES,
    LMDEPLOY,
    check_options,
    engine_for,
    option_owner,
)
from turbofit.memory.known_bad import known_warnings
from turbofit.model.families.engines import engine_problem
from turbofit.planning.commands import option_words
from turbofit.planning.plan_document import (
    document,
    found_words,
    group_words,
    idle_words,
    make_promise,
)
from turbofit.planning.prefix_cache import with_prefix_cache
from turbofit.planning.reasons import (
    FAR,
    beyond_model,
    limit_costs,
    reasons,
    slow_images,
    unkept,
    usual_image,
)
from turbofit.planning.remedies import Remedies, remedies
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.search.search import EngineFit, fit_on_host
from turbofit.planning.search.shapes import Evaluation, unsplittable
from turbofit.planning.search.sizing import longest_context
from turbofit.planning.verdict import Planned, Verdict, fitting
from turbofit.planning.why_lost import (
    forecast_name,
    speed_is_known,
    why_lost,
    why_not_served,
    why_ranked_lower,
)

#: The most rows of ``considered``; the first row is the chosen shape.
_MOST_CANDIDATES = 24
#: The lowest capability that Triton surely supports; on older cards, engines that need Triton are
#: not chosen.
_LEAST_TRITON: Final = (7, 5)


def promise_of(fit: EngineFit) -> Promise:
    """Return the promise of a search's result."""
    best = fit.best
    return make_promise(
        fit.request, best.settings, best.vision_load, best.shape.image_limit, fit.accounts
    )


def plan_of(fit: EngineFit) -> Planned:
    """Make the plan of a search's result, with its verdict, reasons, warnings and remedies."""
    request, best, accounts, fits = fit.request, fit.best, fit.accounts, fit.fits
    over_rival = [_why_engine_lost(fit, fit.rival)[1]] if fits and fit.rival is not None else []
    # A later plan that does not keep a promise is no plan that a person asked for.
    helps, causes = Remedies() if fits or request.promise else remedies(fit)
    usual = usual_image(fit) if fits else UNSET
    verdict = _verdict(fit, causes, usual)
    requests = request.workload.concurrency
    at_once = [part.shape.requests(requests) for part in best.engines]
    largest = max(accounts, key=lambda account: account.units_per_forward)
    why = (*over_rival, *fit.reasons, *reasons(fit, largest))
    plan = document(
        request,
        fit.engine,
        accounts,
        fits=fits,
        verdict=verdict.text,
        parallel_reason=_parallel_reason(fit),
        host=fit.host,
        settings=best.settings,
        vision_load=best.vision_load,
        image_limit=best.shape.image_limit,
        requests=at_once,
        throughput=fit.throughput if fits else None,
        considered=_considered(fit),
        reasons=why,
        warnings=_warnings(fit, promise_of(fit)),
        remedies=helps,
        limit_costs=limit_costs(request, best, fit.engine) if fits else (),
        usual_image=usual,
    )
    return Planned(plan=plan, verdict=verdict)


def _verdict(fit: EngineFit, causes: tuple[str, ...], usual: UsualImage | UnsetType) -> Verdict:
    """Return the verdict: what fits, or why nothing fits and which given options are the cause."""
    request, best, name = fit.request, fit.best, fit.request.model.name
    if not fit.fits:
        return Verdict(subject=name, problem=problem_of(fit), causes=causes)
    found = found_words(request, best.shape.groups, fit.accounts, best.vision_load, usual)
    return Verdict(subject=name, found=found)


def problem_of(fit: EngineFit) -> str:
    """Return what an engine's best shape lacks: host memory, or what `why_not_served` says.

    If no engine can be split over all GPUs, this reason comes first.
    """
    request, best = fit.request, fit.best
    if best.fits and fit.host_problem:
        return fit.host_problem
    problem, why = why_not_served(request, best, fit.engine), _why_apart(request)
    if not (why and problem):
        return problem
    return f"{why}, so an engine has {best.shape.tp} of {len(request.visible)} GPUs: {problem}"


def _why_apart(request: ResolvedRequest) -> str:
    """Return why no engine has all the GPUs; empty where the person chose tp or replicas."""
    chosen = request.tp is not None or request.replicas is not None
    return "" if chosen else unsplittable(request)


def _why_engine_lost(fit: EngineFit, rival: EngineFit) -> tuple[str, str]:
    """Return why LMDeploy's other engine lost, in two texts; `_best_engine` compared them.

    The first text is for that engine's row in ``considered``, the second for the plan's reasons.
    """
    given = " and ".join(
        " ".join(option_words(*option)) for option in fit.request.engine_options.items()
    )
    name = rival.engine.name
    if not rival.fits:
        why, what = problem_of(rival), f"with {given} {name}" if given else name
        return why, f"engine {fit.engine.name}: {what} does not fit: {why}"
    why = why_ranked_lower(fit.request, fit.best, rival.best)
    return why, f"engine {fit.engine.name}: {name}: {why}"


def _considered(fit: EngineFit) -> tuple[Candidate, ...]:
    """Return the rows of ``considered``: the chosen shape, the other engine, the best other shapes.

    All rows after the first say why their shape lost.
    """
    request, chosen, engine = fit.request, fit.best, fit.engine
    rest = [other for other in fit.evaluations if other is not chosen]
    rest.sort(
        key=lambda other: (other.fits, other.rank if other.fits else (-other.short,)), reverse=True
    )
    first: dict[tuple[int, int], int] = {}
    for place, other in enumerate(rest):  # each tp and number of replicas is shown at least once
        first.setdefault((other.shape.tp, other.shape.replicas), place)
    later = set(range(len(rest))) - set(first.values())
    shown = sorted([*first.values(), *sorted(later)][: _MOST_CANDIDATES - 1])
    rows = [_row(request, chosen, why_not_served(request, chosen, engine))]
    if fit.fits and fit.rival is not None:
        rows.append(_row(request, fit.rival.best, _why_engine_lost(fit, fit.rival)[0]))
    others = [rest[place] for place in shown]
    rows += [_row(request, other, why_lost(request, chosen, other, engine)) for other in others]
    return tuple(rows)


def _row(request: ResolvedRequest, evaluation: Evaluation, why_not: str) -> Candidate:
    """Return the row of a candidate; it has no score if its speed is not known."""
    return evaluation.candidate(why_not, shows_score=speed_is_known(request, evaluation))


def _parallel_reason(fit: EngineFit) -> str:
    """Return why this tp and this number of replicas are chosen."""
    request, best = fit.request, fit.best
    if request.tp is not None and request.replicas is not None:
        return "as asked"
    if not best.fits:
        return "the closest to fitting"
    goal = {
        "throughput": f"the most requests per second by {forecast_name(request, best)}",
        "latency": f"the shortest answer by {forecast_name(request, best)}",
        "context": "the most KV tokens for one request",
    }[request.workload.goal]
    if request.workload.goal == "latency" and speed_is_known(request, best):
        others = (it for it in fit.evaluations if it.fits and it.shape.tp != best.shape.tp)
        others = (it for it in others if speed_is_known(request, it))
        rival = max(others, key=lambda it: it.score, default=None)
        beside = f"; tp {rival.shape.tp}: {1 / rival.score:.1f} s" if rival else ""
        goal += f" ({request.workload.output_tokens} tokens in {1 / best.score:.1f} s{beside})"
    if request.least:
        goal = "the least memory"
    return f"{goal} of {counted(len(fit.evaluations), 'shape')}, the promises kept first"


def _warnings(fit: EngineFit, promise: Promise) -> Iterator[str]:
    """Yield the plan's warnings, for example about known faults, idle cards or unequal cards."""
    request, best, shape, engine = fit.request, fit.best, fit.best.shape, fit.engine
    if fit.fits:
        yield from unkept(request, promise.context)
        yield from beyond_model(request, best.settings.session_len)
    if best.fits:
        yield from known_warnings_of(fit)
        if idle := idle_words(request, shape.groups):
            why = _why_apart(request)
            yield f"{idle}, since {why}" if why else idle
        for group in shape.groups:
            if len({request.machine.gpu(index).name for index in group}) > 1:
                yield (
                    f"{group_words(request, group)} is split over unequal cards, as you asked: the"
                    " card with the least free memory sizes the cache of all cards, and the slowest"
                    " card sets their speed"
                )
        if shape.units_per_forward is not None:
            yield QUEUED
            if any(may_evict(part.settings, part.kv_tokens) for part in best.parts):
                tokens = request.workload.unstated_answer
                yield (
                    f"an answer ends after {tokens:,} tokens if its request states no max_tokens,"
                    " so that image requests run beside each other"
                )
        if fit.requested_load.units_per_image:
            yield (
                f"{BEYOND}: turbofit serve and turbofit.pipeline keep these limits, LMDeploy itself"
                " does not"
            )
        yield from slow_images(fit)
        yield from dict.fromkeys(
            text for part in best.parts for text in engine.warnings(part.settings)
        )
    if request.model.needs_remote_code:
        yield OWN_CODE


def known_warnings_of(fit: EngineFit) -> tuple[str, ...]:
    """Return a warning for each known fault of the plan's engines, such as wrong answers."""
    launches = [account.launch for account in fit.accounts]
    # A server's clients do not meet the faults of an option that nobody gave.
    return known_warnings(launches, fit.engine, asked=not fit.request.prefix_caching)


def best_plan(request: ResolvedRequest, engine: str = "auto") -> Plan:
    """Return the plan of `plan_best`, without its verdict."""
    return plan_best(request, engine).document


def plan_best(request: ResolvedRequest, engine: str = "auto") -> Planned:
    """Plan on the named engine; with ``auto``, on the engine that serves more.

    Raises:
        UsageError: a part of the request cannot be used here at all.
        PackageError: turbofit has no account for the engine.
        NoKernelError: no engine that runs the model has code for these cards.
    """
    fit = choose(request, engine)
    if isinstance(fit, Planned):
        return fit
    planned = plan_of(fit)
    if fit.fits:
        return planned
    if _engine_of_options(request, engine)[0] == "auto":
        return planned.with_remedies(last=tuple(_other_engines(request, fit.rival)))
    return _with_other_engine(request, planned)


def choose(request: ResolvedRequest, engine: str = "auto") -> EngineFit | Planned:
    """Return the search's result for the engine that `plan_best` takes.

    Its engines have a prefix cache where that costs little. An engine without a search
    (Transformers) has a plan instead.
    """
    fit = _choose(request, engine)
    return fit if isinstance(fit, Planned) else with_prefix_cache(fit)


def _choose(request: ResolvedRequest, engine: str = "auto") -> EngineFit | Planned:
    """Return the search's result, without a prefix cache, for the engine that serves more."""
    engine, reasons = _engine_of_options(request, engine)
    first = engine_for(request.model, engine)
    check_options(first, request.engine_options)
    if first.backend.serial:
        from turbofit.planning.fallback import plan_fallback

        named = engine != "auto"
        reason = "as asked" if named else str(engine_problem(request.model, LMDEPLOY[0]))
        planned = plan_fallback(request, first, reason)
        too_few = request.promised_requests is not None and not planned.document.fits
        return _with_other_engine(request, planned) if too_few and named else planned
    try:
        fit = fit_on_host(request, first)
    except NoKernelError as exc:
        return _with_kernels(request, engine, first, exc)
    fit = replace(fit, reasons=(*reasons, *fit.reasons))
    by_memory = request.workload.goal == "context" or request.least
    whole = fit.image_limit is None or fit.image_limit == request.requested_image_limit
    long = fit.best.settings.session_len >= longest_context(fit.served_request)
    keeps_all = fit.fits and whole and long
    if engine != "auto" or (keeps_all and not by_memory):
        return fit
    return _at_one_limit(request, _best_engine(request, fit))


def _at_one_limit(request: ResolvedRequest, fit: EngineFit) -> EngineFit:
    """Return the result of the engine that is best at the image limit of ``fit``.

    An engine that holds too few of the promised requests keeps the wished limit in its own search,
    and may be the better engine at a lower limit.
    """
    served = fit.served_request
    lowered = served.image_limit != request.image_limit
    if not (fit.fits and lowered and request.promised_requests):
        return fit
    best = _choose(served)
    if isinstance(best, Planned) or best.engine.name == fit.engine.name:
        return fit
    rival = best.rival and replace(best.rival, request=request)
    return replace(best, request=request, rival=rival)


def _best_engine(request: ResolvedRequest, fit: EngineFit) -> EngineFit:
    """Return the first engine's result, or the result of LMDeploy's other engine if it is better.

    `_serves_more` decides which result is better. ``fit`` is the first engine's result. If no
    engine fits, the result that holds the most requests is returned. If only the other engine fits,
    but its kernels may not compile for these cards, the other result becomes the ``rival`` of
    ``fit``.
    """
    rivals = list(_fits_of_others(request, fit.engine.name))
    rival = next((other for other in rivals if other.fits), None)
    compiles = _compiles(request)
    if rival is not None and compiles and _serves_more(rival, fit):
        return replace(rival, rival=fit)
    if fit.fits:
        return fit
    if rival is None and compiles and fit.best.held_requests:
        return max((fit, *rivals), key=lambda other: other.best.held_requests)
    return replace(fit, rival=rival)


def _engine_of_options(request: ResolvedRequest, engine: str) -> tuple[str, tuple[str, ...]]:
    """Return the name of the engine to plan on, and the reasons for this engine.

    ``auto`` becomes the PyTorch engine if only this engine has a given option.
    """
    owner = option_owner(request.engine_options) if engine == "auto" else None
    if owner is None or owner[0] == LMDEPLOY[0] or engine_problem(request.model, owner[0]):
        return engine, ()
    name, option = owner
    return name, (f"engine {name}: it alone takes {option}",)


def _with_kernels(
    request: ResolvedRequest, engine: str, first: Engine, lacking: NoKernelError
) -> EngineFit:
    """Return the result of the PyTorch engine, if TurboMind has no kernels for these cards.

    The PyTorch engine compiles its kernels. With ``auto`` the result may not fit: then only more or
    larger cards help. If the person named the engine that lacks kernels, the error names the other
    engine as its hint.

    Raises:
        NoKernelError: the person named the engine, or no other engine helps.
    """
    compiles = first.name == LMDEPLOY[0] and _compiles(request)
    rivals = _fits_of_others(request, first.name) if compiles else ()
    fit = next((rival for rival in rivals if rival.fits or engine == "auto"), None)
    if fit is None:
        raise lacking
    if engine == "auto":
        reason = f"engine {fit.engine.name}: it compiles its kernels; {lacking.message}"
        return replace(fit, reasons=(reason, *fit.reasons))
    raise NoKernelError(
        lacking.message,
        hint=f"`--engine {fit.engine.name}` serves: it compiles its kernels",
    )


def _with_other_engine(request: ResolvedRequest, planned: Planned) -> Planned:
    """Add another engine as a remedy to a plan that does not fit, if the request fits on it."""
    name = planned.document.backend.name
    fit = next((other for other in _fits_of_others(request, name) if other.fits), None)
    if fit is None:
        return planned
    remedy = fitting(f"--engine {fit.engine.name}", f"{fit.tokens:,} KV tokens")
    return planned.with_remedies(first=(remedy,))


def _fits_of_others(request: ResolvedRequest, but: str) -> Iterator[EngineFit]:
    """Yield the search result of each engine of LMDeploy, except ``but``, that runs the model."""
    for name in [other for other in LMDEPLOY if other != but]:
        with suppress(TurbofitError):
            engine = engine_for(request.model, name)
            check_options(engine, request.engine_options)
            yield fit_on_host(request, engine)


def _compiles(request: ResolvedRequest) -> bool:
    """Return whether Triton surely compiles for every card."""
    return all(capability_of(gpu) >= _LEAST_TRITON for gpu in request.visible)


def _engine_order(fit: EngineFit) -> tuple[float, ...]:
    """Return the sort key that decides between LMDeploy's two engines: the larger key wins.

    A result that fits is above a result that does not fit. Then `Evaluation.worth` decides, but
    without the forecast of speed. `why_ranked_lower` compares the same figures in the same order.
    """
    worth = fit.best.worth
    by_context = fit.request.workload.goal == "context"  # then the last part is KV tokens
    return fit.fits, *(worth if by_context else worth[:-1])


def _serves_more(rival: EngineFit, fit: EngineFit) -> bool:
    """Whether LMDeploy's other engine serves more than the first engine, whose result is ``fit``.

    Images and a context that nobody asked for count only where they are far larger: images are slow
    on the PyTorch engine, and its speed is seldom known. So a card with more memory, where
    TurboMind serves, may promise up to a third less than a card where only the PyTorch engine does.
    """
    request = fit.request
    if not fit.fits or request.least or request.workload.goal == "context":
        return _engine_order(rival) > _engine_order(fit)
    size_given = request.image_limit is not None or request.workload.image_size is not None
    images = fit.best.served / rival.best.served
    tokens = fit.best.settings.session_len / rival.best.settings.session_len
    if images < (1 if size_given else FAR):
        return True
    return images <= 1 and tokens < (1 if request.context_given else FAR)


def _other_engines(request: ResolvedRequest, rival: EngineFit | None) -> Iterator[Remedy]:
    """Yield a remedy for each other engine that can serve the request.

    ``rival`` is the result of LMDeploy's other engine if it fits, but may not compile.
    """
    from turbofit.planning.fallback import plan_fallback

    if rival is not None:
        yield fitting(
            f"--engine {rival.engine.name}",
            f"{rival.tokens:,} KV tokens, if its Triton still compiles for a card as old as this",
        )
    for name in [other for other in ENGINES if other not in LMDEPLOY]:
        with suppress(
            TurbofitError
        ):  # the engine does not run the model, or not with these options
            engine = engine_for(request.model, name)
            check_options(engine, request.engine_options)
            plan = plan_fallback(request, engine, "").document
            places = (plan.engines[0].device_map or {}).values()
            off = any(not isinstance(place, int) for place in places)
            slow = "one request at a time, and slower"
            if off:
                slow += ", with decoder layers in host memory"
            if plan.fits:
                yield fitting(f"--engine {name}", slow)
