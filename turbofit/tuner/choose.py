"""Which engine: TurboMind, where the PyTorch engine does not serve more of what was asked.

TurboMind decodes faster. But it takes more while it loads, and other memory for images, so that on
some cards only the other engine starts, admits images whole, or holds the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, TurbofitError
from turbofit.core.log import LazyLogger
from turbofit.core.messages import plural
from turbofit.core.plan import Plan, Remedy
from turbofit.memory.engine import Engine
from turbofit.memory.engines import ENGINES, LMDEPLOY, check_options, engine_for
from turbofit.memory.shared_terms import capability_of
from turbofit.model.families.engines import engine_problem
from turbofit.tuner.engine_plan import make_plan
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.sizing import longest_context

__all__ = ["best_plan"]

_LOG: Final = LazyLogger(__name__)

#: Triton compiles for these and newer ones; an engine that needs it is not chosen for older ones.
_LEAST_TRITON: Final = (7, 5)


def best_plan(request: ResolvedRequest, engine: str = "auto") -> Plan:
    """The best plan on the engine that was asked for, or on the one that serves more.

    Raises:
        UsageError: something asked for cannot be used here at all.
        PackageError: turbofit has no account for the engine.
        NoKernelError: no engine that runs the model has code for these cards.
    """
    first = engine_for(request.model, engine)
    check_options(first, request.fixed)
    if first.planned.serial:
        reason = "as asked" if engine != "auto" else engine_problem(request.model, LMDEPLOY[0])
        _LOG.info("engine %s: %s", first.name, reason)
        return _serial(request, first, str(reason))
    try:
        made = _planned(request, first)
    except NoKernelError as exc:
        return _with_kernels(request, engine, first, exc)
    if engine != "auto":
        return made if made.fits else _with_other_engine(request, made)
    if _keeps_all(request, made) and request.workload.goal != "context":
        return made
    rival = _rival(request, made.engine.name)
    _LOG.info(
        "engine %s: %s; LMDeploy's other one: %s",
        made.engine.name, made.verdict, "does not fit" if rival is None else rival.verdict,
    )  # fmt: skip
    if rival is not None and _compiles(request) and _worth(request, rival) > _worth(request, made):
        return _told(rival, made)
    if made.fits:
        return made
    return replace(made, remedies=(*made.remedies, *_other_engines(request, rival)))


def _with_kernels(
    request: ResolvedRequest, engine: str, first: Engine, lacking: NoKernelError
) -> Plan:
    """The plan on the engine that compiles its kernels, where the first holds none for the cards.

    Raises:
        NoKernelError: no other engine may be taken, or none serves.
    """
    rival = _rival(request, first.name) if _compiles(request) else None
    if rival is None:
        raise lacking
    if engine == "auto":
        reason = f"engine {rival.engine.name}: it compiles its kernels; {lacking.message}"
        return replace(rival, reasons=(reason, *rival.reasons))
    raise NoKernelError(
        lacking.message, hint=f"--engine {rival.engine.name} serves: it compiles its kernels"
    )


def _serial(request: ResolvedRequest, engine: Engine, reason: str) -> Plan:
    from turbofit.tuner.fallback.fallback_plan import make_fallback_plan

    return make_fallback_plan(request, engine, reason)


def _with_other_engine(request: ResolvedRequest, made: Plan) -> Plan:
    """A plan that does not fit on the engine that was named, with the one on which it does."""
    plan = _serving(request, [name for name in LMDEPLOY if name != made.engine.name])
    if plan is None:
        return made
    effect = f"fits: {plan.kv.tokens:,} KV tokens"
    remedy = Remedy(change=f"--engine {plan.engine.name}", effect=effect)
    return replace(made, remedies=(remedy, *made.remedies))


def _planned(request: ResolvedRequest, engine: Engine) -> Plan:
    """The plan, with fewer engines where host memory does not do for as many as the GPUs hold."""
    made = make_plan(request, engine)
    if not _host_short(made) or request.replicas is not None or request.groups is not None:
        return made
    for replicas in range(made.parallel.replicas - 1, 0, -1):
        try:
            fewer = make_plan(replace(request, replicas=replicas), engine)
        except TurbofitError:
            continue
        if fewer.fits:
            why = f"replicas {replicas}: host memory does not do for {made.parallel.replicas}"
            reason = f"{fewer.parallel.reason}; {why}"
            parallel = replace(fewer.parallel, reason=reason)
            return replace(fewer, parallel=parallel, reasons=(why, *fewer.reasons))
    return made


def _host_short(plan: Plan) -> bool:
    host = plan.host
    return host.available is not None and host.pinned + host.pageable > host.available


def _rival(request: ResolvedRequest, first: str) -> Plan | None:
    """The plan on LMDeploy's engine after this one; None where it does not run or not fit."""
    return _serving(request, LMDEPLOY[LMDEPLOY.index(first) + 1 :])


def _serving(request: ResolvedRequest, names: Iterable[str]) -> Plan | None:
    """The plan on the first of these engines that runs the model and on which it fits."""
    for name in names:
        try:
            other = engine_for(request.model, name)
            check_options(other, request.fixed)
            plan = _planned(request, other)
        except TurbofitError as exc:
            _LOG.debug("engine %s: %s", name, exc.message)
            continue
        if plan.fits:
            return plan
    return None


def _compiles(request: ResolvedRequest) -> bool:
    """Whether Triton is sure to compile for every card."""
    return all(capability_of(gpu) >= _LEAST_TRITON for gpu in request.visible)


def _keeps_all(request: ResolvedRequest, plan: Plan) -> bool:
    """Whether it fits, with images as large as was asked and the longest context."""
    limits = plan.limits
    whole = limits.vision_unit is None or limits.image_limit == request.requested_limit
    return plan.fits and whole and plan.settings.session_len >= longest_context(request)


def _worth(request: ResolvedRequest, plan: Plan) -> tuple[bool, int, int, int]:
    """What is promised: images, then the context; with the goal of context the tokens."""
    tokens = plan.kv.tokens if request.workload.goal == "context" else 0
    return plan.fits, plan.limits.units_per_image, plan.settings.session_len, tokens


def _told(won: Plan, lost: Plan) -> Plan:
    """The better plan, with the other's row and the reason."""
    row = lost.considered[0]
    if not lost.fits:
        why = f"{lost.engine.name} {lost.verdict}"
    elif lost.limits.units_per_image < won.limits.units_per_image:
        fewer, more = lost.limits.units_per_image, won.limits.units_per_image
        why = (
            f"{lost.engine.name} serves images of {fewer:,}"
            f" {plural(fewer, won.limits.vision_unit or 'unit')} at most, this one of {more:,}"
        )
    elif lost.settings.session_len < won.settings.session_len:
        shorter, context = lost.settings.session_len, won.settings.session_len
        why = f"{lost.engine.name} holds a context of {shorter:,} tokens, this one of {context:,}"
    else:
        why = f"{lost.engine.name} holds {lost.kv.tokens:,} KV tokens, fewer than this"
    return replace(
        won,
        considered=(
            won.considered[0],
            replace(row, why_not=row.why_not or why),
            *won.considered[1:],
        ),
        reasons=(f"engine {won.engine.name}: {why}", *won.reasons),
    )


def _other_engines(request: ResolvedRequest, rival: Plan | None) -> Iterator[Remedy]:
    """Engines that would serve, and why they are not chosen."""
    if rival is not None:
        yield Remedy(
            change=f"--engine {rival.engine.name}",
            effect=f"fits: {rival.kv.tokens:,} KV tokens, if its Triton still compiles for a card"
            " as old as this",
        )
    for name in [one for one in ENGINES if one not in LMDEPLOY]:
        try:
            whole = _serial(replace(request, fixed={}), engine_for(request.model, name), "")
        except TurbofitError:  # it does not run the model, or not so
            continue
        if whole.fits:
            yield Remedy(
                change=f"--engine {name}", effect="fits: one request at a time, and slower"
            )
