"""Which engine: TurboMind, where the PyTorch engine does not serve more of what was asked.

TurboMind decodes faster. But it takes more while it loads, and other memory for images, so that on
some cards only the other engine starts, admits images whole, or holds the context. Where the least
memory is asked for, the engine that takes less is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.errors import NoKernelError, TurbofitError
from turbofit.core.messages import option_of, plural
from turbofit.core.plan import Plan, Remedy
from turbofit.core.process.log import LazyLogger
from turbofit.core.units import format_bytes
from turbofit.memory.engine import Engine
from turbofit.memory.engines import (
    ENGINES,
    LMDEPLOY,
    check_options,
    engine_for,
    option_owner,
)
from turbofit.memory.shared_terms import capability_of
from turbofit.model.families.engines import engine_problem
from turbofit.tuner.engine_fit import EngineFit, fit_on_host
from turbofit.tuner.engine_plan import plan_of
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.context import longest_context

__all__ = ["ChosenEngine", "best_plan", "choose"]

_LOG: Final = LazyLogger(__name__)

#: Triton compiles for these and newer ones; an engine that needs it is not chosen for older ones.
_LEAST_TRITON: Final = (7, 5)


class ChosenEngine(NamedTuple):
    """The engine that was chosen, and what its plan says more because others were looked at."""

    fit: EngineFit
    more: Callable[[Plan], Plan] | None = None
    reasons: tuple[str, ...] = ()

    def plan(self) -> Plan:
        """The whole plan, without the command lines."""
        made = plan_of(self.fit)
        made = made if self.more is None else self.more(made)
        return replace(made, reasons=(*self.reasons, *made.reasons))


def best_plan(request: ResolvedRequest, engine: str = "auto") -> Plan:
    """The best plan on the engine that was asked for, or on the one that serves more.

    Raises:
        UsageError: something asked for cannot be used here at all.
        PackageError: turbofit has no account for the engine.
        NoKernelError: no engine that runs the model has code for these cards.
    """
    found = choose(request, engine)
    return found if isinstance(found, Plan) else found.plan()


def choose(request: ResolvedRequest, engine: str = "auto") -> ChosenEngine | Plan:
    """What `best_plan` tells of, before words are made; of an engine without a search its plan.

    An option that one engine alone takes chooses that engine, where it runs the model; TurboMind
    comes first anyway.

    Raises:
        As :func:`best_plan`.
    """
    owner = option_owner(request.fixed) if engine == "auto" else None
    if owner is None or owner[0] == LMDEPLOY[0] or engine_problem(request.model, owner[0]):
        return _choose(request, engine)
    name, option = owner
    found = _choose(request, name)
    if isinstance(found, Plan):
        return found
    return found._replace(reasons=(f"engine {name}: it alone takes {option}",))


def _choose(request: ResolvedRequest, engine: str) -> ChosenEngine | Plan:
    first = engine_for(request.model, engine)
    check_options(first, request.fixed)
    if first.planned.serial:
        reason = "as asked" if engine != "auto" else engine_problem(request.model, LMDEPLOY[0])
        _LOG.info("engine %s: %s", first.name, reason)
        plan = _serial(request, first, str(reason))
        too_few = request.promised_requests is not None and not plan.fits
        return _with_other_engine(request, plan) if too_few and engine != "auto" else plan
    try:
        made = fit_on_host(request, first)
    except NoKernelError as exc:
        return _with_kernels(request, engine, first, exc)
    if engine != "auto":
        if made.fits:
            return ChosenEngine(made)
        return ChosenEngine(made, lambda plan: _with_other_engine(request, plan))
    by_memory = request.workload.goal == "context" or request.least
    if _keeps_all(request, made) and not by_memory:
        return ChosenEngine(made)
    rival = _rival(request, made.engine.name)
    _LOG.info(
        "engine %s: fits %s; LMDeploy's other one: %s",
        made.engine.name, made.fits, "does not fit" if rival is None else rival.engine.name,
    )  # fmt: skip
    if rival is not None and _compiles(request) and _worth(request, rival) > _worth(request, made):
        return ChosenEngine(rival, lambda plan: _with_reason_against(plan, plan_of(made)))
    if made.fits:
        return ChosenEngine(made)
    if rival is None and made.found.best.held and _compiles(request):
        fits = (made, *_running(request, _after(made.engine.name)))
        made = max(fits, key=lambda fit: fit.found.best.held)
    return ChosenEngine(made, lambda plan: _with_others(request, plan, rival))


def _with_kernels(
    request: ResolvedRequest, engine: str, first: Engine, lacking: NoKernelError
) -> ChosenEngine:
    """The engine that compiles its kernels, where the first holds none for the cards.

    It is the answer where it does not fit, too: more or larger cards help then, and no others.

    Raises:
        NoKernelError: no other engine may be taken, or none runs the model.
    """
    rivals = _running(request, _after(first.name)) if _compiles(request) else ()
    made = next((fit for fit in rivals if fit.fits or engine == "auto"), None)
    if made is None:
        raise lacking
    if engine == "auto":
        reason = f"engine {made.engine.name}: it compiles its kernels; {lacking.message}"
        others = None if made.fits else lambda plan: _with_others(request, plan, None)
        return ChosenEngine(made, others, reasons=(reason,))
    raise NoKernelError(
        lacking.message, hint=f"--engine {made.engine.name} serves: it compiles its kernels"
    )


def _serial(request: ResolvedRequest, engine: Engine, reason: str) -> Plan:
    from turbofit.tuner.fallback.fallback_plan import make_fallback_plan

    return make_fallback_plan(request, engine, reason)


def _with_other_engine(request: ResolvedRequest, made: Plan) -> Plan:
    """A plan that does not fit on the engine that was named, with the one on which it does."""
    fit = _serving(request, [name for name in LMDEPLOY if name != made.engine.name])
    if fit is None:
        return made
    remedy = Remedy(change=f"--engine {fit.engine.name}", effect=f"fits: {fit.tokens:,} KV tokens")
    return replace(made, remedies=(remedy, *made.remedies))


def _with_others(request: ResolvedRequest, made: Plan, rival: EngineFit | None) -> Plan:
    """A plan that does not fit, with the engines on which it does."""
    return replace(made, remedies=(*made.remedies, *_other_engines(request, rival)))


def _rival(request: ResolvedRequest, first: str) -> EngineFit | None:
    """LMDeploy's engine after this one; None where it does not run or not fit."""
    return _serving(request, _after(first))


def _after(first: str) -> tuple[str, ...]:
    return LMDEPLOY[LMDEPLOY.index(first) + 1 :]


def _serving(request: ResolvedRequest, names: Iterable[str]) -> EngineFit | None:
    """The first of these engines that runs the model and on which it fits."""
    return next((fit for fit in _running(request, names) if fit.fits), None)


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
    return fit.fits and whole and fit.settings.session_len >= longest_context(request)


def _worth(request: ResolvedRequest, fit: EngineFit) -> tuple[int, ...]:
    """What is promised: images, then the context; then memory, or tokens, where that decides."""
    tokens = fit.tokens if request.workload.goal == "context" else 0
    units, context = fit.vision_load.units_per_image, fit.settings.session_len
    return fit.fits, units, context, -fit.found.best.footprint, tokens


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
            taken = {
                key: value
                for key, value in request.fixed.items()
                if _takes_option(engine, key, value)
            }
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
