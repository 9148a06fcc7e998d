"""Which engine: TurboMind, where the PyTorch engine does not serve more of what was asked.

TurboMind decodes faster. But it takes more while it loads, and other memory for images, so that on
some cards only the other engine starts, admits images whole, or holds the context. Where the least
memory is asked for, the engine that takes less is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, TurbofitError
from turbofit.core.messages import option_of, plural
from turbofit.core.plan import Plan, Remedy
from turbofit.core.process.log import LazyLogger
from turbofit.core.units import format_bytes
from turbofit.memory.account import Engine, capability_of
from turbofit.memory.engines import (
    ENGINES,
    LMDEPLOY,
    check_options,
    engine_for,
    option_owner,
)
from turbofit.model.families.engines import engine_problem
from turbofit.tuner.engine_plan import plan_of
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.search import EngineFit, fit_on_host
from turbofit.tuner.search.sizing import longest_context

__all__ = ["best_plan", "choose"]

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
    fit = choose(request, engine)
    if isinstance(fit, Plan):
        return fit
    plan = plan_of(fit)
    if fit.fits:
        if fit.rival is not None:
            plan = _with_reason_against(plan, plan_of(fit.rival))
    elif _named(request, engine)[0] == "auto":
        plan = replace(plan, remedies=(*plan.remedies, *_other_engines(request, fit.rival)))
    else:
        plan = _with_other_engine(request, plan)
    reasons = [fit.reason] if fit.reason else []
    return replace(plan, reasons=(*reasons, *plan.reasons))


def choose(request: ResolvedRequest, engine: str = "auto") -> EngineFit | Plan:
    """What `best_plan` tells of, before words are made; of an engine without a search its plan.

    Raises:
        As :func:`best_plan`.
    """
    engine, reason = _named(request, engine)
    fit = _choose(request, engine)
    return fit if isinstance(fit, Plan) or not reason else replace(fit, reason=reason)


def _named(request: ResolvedRequest, engine: str) -> tuple[str, str]:
    """The engine that is asked for, and why, where it alone takes an option that is set.

    TurboMind comes first anyway, and an engine that does not run the model is not chosen so.
    """
    owner = option_owner(request.fixed) if engine == "auto" else None
    if owner is None or owner[0] == LMDEPLOY[0] or engine_problem(request.model, owner[0]):
        return engine, ""
    name, option = owner
    return name, f"engine {name}: it alone takes {option}"


def _choose(request: ResolvedRequest, engine: str) -> EngineFit | Plan:
    first = engine_for(request.model, engine)
    check_options(first, request.fixed)
    if first.planned.serial:
        reason = "as asked" if engine != "auto" else engine_problem(request.model, LMDEPLOY[0])
        _LOG.info("engine %s: %s", first.name, reason)
        plan = _serial(request, first, str(reason))
        too_few = request.promised_requests is not None and not plan.fits
        return _with_other_engine(request, plan) if too_few and engine != "auto" else plan
    try:
        fit = fit_on_host(request, first)
    except NoKernelError as exc:
        return _with_kernels(request, engine, first, exc)
    by_memory = request.workload.goal == "context" or request.least
    if engine != "auto" or (_keeps_all(request, fit) and not by_memory):
        return fit
    rivals = list(_running(request, _after(fit.engine.name)))
    rival = next((one for one in rivals if one.fits), None)
    _LOG.info(
        "engine %s: fits %s; LMDeploy's other one: %s",
        fit.engine.name, fit.fits, "does not fit" if rival is None else rival.engine.name,
    )  # fmt: skip
    compiles = _compiles(request)
    if rival is not None and compiles and _worth(request, rival) > _worth(request, fit):
        return replace(rival, rival=fit)
    if fit.fits:
        return fit
    if rival is None and fit.best.held and compiles:
        fit = max((fit, *rivals), key=lambda one: one.best.held)
    return replace(fit, rival=rival)


def _with_kernels(
    request: ResolvedRequest, engine: str, first: Engine, lacking: NoKernelError
) -> EngineFit:
    """The engine that compiles its kernels, where the first holds none for the cards.

    It is the answer where it does not fit, too: more or larger cards help then, and no others.

    Raises:
        NoKernelError: no other engine may be taken, or none runs the model.
    """
    rivals = _running(request, _after(first.name)) if _compiles(request) else ()
    fit = next((one for one in rivals if one.fits or engine == "auto"), None)
    if fit is None:
        raise lacking
    if engine == "auto":
        reason = f"engine {fit.engine.name}: it compiles its kernels; {lacking.message}"
        return replace(fit, reason=reason)
    raise NoKernelError(
        lacking.message, hint=f"--engine {fit.engine.name} serves: it compiles its kernels"
    )


def _serial(request: ResolvedRequest, engine: Engine, reason: str) -> Plan:
    from turbofit.tuner.fallback.fallback_plan import make_fallback_plan

    return make_fallback_plan(request, engine, reason)


def _with_other_engine(request: ResolvedRequest, made: Plan) -> Plan:
    """A plan that does not fit on the engine that was named, with the one on which it does."""
    others = _running(request, [name for name in LMDEPLOY if name != made.engine.name])
    fit = next((one for one in others if one.fits), None)
    if fit is None:
        return made
    remedy = Remedy(change=f"--engine {fit.engine.name}", effect=f"fits: {fit.tokens:,} KV tokens")
    return replace(made, remedies=(remedy, *made.remedies))


def _after(first: str) -> tuple[str, ...]:
    return LMDEPLOY[LMDEPLOY.index(first) + 1 :]


def _running(request: ResolvedRequest, names: Iterable[str]) -> Iterator[EngineFit]:
    """The fits of those engines that run the model here, whether it fits or not."""
    return (fit for fit in (_on(request, name) for name in names) if fit is not None)


def _on(request: ResolvedRequest, name: str) -> EngineFit | None:
    try:
        engine = engine_for(request.model, name)
        check_options(engine, request.fixed)
        return fit_on_host(request, engine)
    except TurbofitError as exc:
        _LOG.debug("engine %s: %s", name, exc.message)
        return None


def _compiles(request: ResolvedRequest) -> bool:
    """Whether Triton is sure to compile for every card."""
    return all(capability_of(gpu) >= _LEAST_TRITON for gpu in request.visible)


def _keeps_all(request: ResolvedRequest, fit: EngineFit) -> bool:
    """Whether it fits, with images as large as was asked and the longest context."""
    whole = fit.limit is None or fit.limit == request.requested_limit
    return fit.fits and whole and fit.best.settings.session_len >= longest_context(request)


def _worth(request: ResolvedRequest, fit: EngineFit) -> tuple[int, ...]:
    """What is promised: images, then the context; then memory, or tokens, where that decides."""
    tokens = fit.tokens if request.workload.goal == "context" else 0
    units, context = fit.best.vision_load.units_per_image, fit.best.settings.session_len
    return fit.fits, units, context, -fit.best.footprint, tokens


def _with_reason_against(chosen: Plan, other: Plan) -> Plan:
    """The better plan, with the other's row and the reason."""
    row = other.considered[0]
    if not other.fits:
        why = f"{other.engine.name} {other.verdict}"
    elif other.limits.units_per_image < chosen.limits.units_per_image:
        fewer, more = other.limits.units_per_image, chosen.limits.units_per_image
        why = (
            f"{other.engine.name} serves images of {fewer:,}"
            f" {plural(fewer, chosen.limits.vision_unit or 'unit')} at most, this one of {more:,}"
        )
    elif other.settings.session_len < chosen.settings.session_len:
        shorter, context = other.settings.session_len, chosen.settings.session_len
        why = f"{other.engine.name} holds a context of {shorter:,} tokens, this one of {context:,}"
    elif chosen.footprint is not UNSET and other.footprint is not UNSET:
        saved = format_bytes(sum(other.footprint.taken) - sum(chosen.footprint.taken))
        why = f"{other.engine.name} takes {saved} more"
    else:
        why = f"{other.engine.name} holds {other.kv.tokens:,} KV tokens, fewer than this"
    return replace(
        chosen,
        considered=(
            chosen.considered[0],
            replace(row, why_not=row.why_not or why),
            *chosen.considered[1:],
        ),
        reasons=(f"engine {chosen.engine.name}: {why}", *chosen.reasons),
    )


def _other_engines(request: ResolvedRequest, rival: EngineFit | None) -> Iterator[Remedy]:
    """Engines that would serve, and why they are not chosen."""
    if rival is not None:
        yield Remedy(
            change=f"--engine {rival.engine.name}",
            effect=f"fits: {rival.tokens:,} KV tokens, if its Triton still compiles for a card"
            " as old as this",
        )
    for name in [one for one in ENGINES if one not in LMDEPLOY]:
        try:
            engine = engine_for(request.model, name)
            taken = {k: v for k, v in request.fixed.items() if _takes_option(engine, k, v)}
            whole = _serial(replace(request, fixed=taken), engine, "")
        except TurbofitError:  # it does not run the model, or not so
            continue
        if whole.fits:
            off = any(not isinstance(place, int) for place in (whole.device_map or {}).values())
            effect = "fits: one request at a time, and slower"
            effect += ", with decoder layers in host memory" if off else ""
            out = ", ".join(option_of(key) for key in request.fixed if key not in taken)
            change = f"--engine {name}, and leave {out} out" if out else f"--engine {name}"
            yield Remedy(change=change, effect=effect)


def _takes_option(engine: Engine, option: str, value: object) -> bool:
    """Whether the engine takes one of LMDeploy's options."""
    try:
        check_options(engine, {option: value})
    except TurbofitError:
        return False
    return True
