"""Finds all settings that a tuning may try: their plans fit and keep the promise.

The promise is the image limit and the context of the plan that turbofit makes without tuning.
"""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import SPECULATIVE
from turbofit.core.tuning import TrialForecast
from turbofit.memory.account import NO_IMAGES, VisionLoad
from turbofit.planning.plan import plan as best_plan
from turbofit.planning.speed import ClosedLoad, engine_rates, rates, speed_of
from turbofit.planning.throughput import host_rate, kind_of, surety_of, with_host

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from turbofit.core.plan import Plan
    from turbofit.measure.load.spec import LoadSpec
    from turbofit.planning.request import PlanRequest
    from turbofit.planning.throughput import HostRate

_BATCHES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_PREFILLS: Final = (1024, 2048, 4096, 8192, 16384)


class LoadForecast(NamedTuple):
    """What a plan is expected to do under a load; trials are ordered by it.

    ``ttft`` and ``tpot`` are in seconds. ``told`` has the figures as people see them.
    """

    requests_per_second: float
    ttft: float
    tpot: float
    told: TrialForecast


def forecast_of(plan: Plan, load: LoadSpec, at_once: float) -> LoadForecast:
    """Forecast the speed of all engines of a plan together, with ``at_once`` requests in all.

    As in a plan's own forecast (`throughput.forecast`), the host prepares images at the same time.
    """
    images, output = _vision_load(plan, load), load.output_tokens or plan.workload.output_tokens
    closed = ClosedLoad(
        prompt=load.prompt_tokens + images.tokens_per_request,
        output=output,
        at_once=at_once / len(plan.groups),
        images=images,
    )
    rate, ttft, tpot = 0.0, 0.0, 0.0
    for engine in plan.engines:
        group = engine_rates(plan, engine)
        speed = speed_of(group, rates(), closed, engine.settings, engine.kv.tokens)
        rate += speed.requests_per_second
        ttft = max(ttft, speed.seconds_to_first_token)
        # After its first token a request also waits for the prefills of later requests.
        taken = speed.seconds_per_request - speed.seconds_to_first_token
        tpot = max(tpot, taken / output, speed.step)
    host = host_of(plan, load)
    if host is not None:
        rate, waits = with_host(max(rate, 1e-9), at_once, host, load.images)
        ttft += waits
    gpus = [plan.machine.gpu(index) for group in plan.groups for index in group]
    kind = kind_of(plan.model, plan.backend.name, gpus, images=load.images > 0)
    sure, first = surety_of(kind, gpus), surety_of(f"first token among others, {kind}", gpus)
    told = TrialForecast(
        requests_per_second=sure.shown(rate, 4), ttft=first.shown(ttft, 4), tpot=sure.shown(tpot, 4)
    )
    return LoadForecast(rate, ttft, tpot, told)


def host_of(plan: Plan, load: LoadSpec) -> HostRate | None:
    """Return how fast the host prepares the images of a load; None without images."""
    rule, threads, images = plan.model.image_rule, plan.host.image_threads, _vision_load(plan, load)
    return host_rate(
        plan.machine, rule, images, plan.replicas, size=load.image_size, threads=threads
    )


def _vision_load(plan: Plan, load: LoadSpec) -> VisionLoad:
    rule, limit = plan.model.image_rule, plan.promise.image_limit
    if rule is None or not load.images:
        return NO_IMAGES
    units = rule.units(*load.image_size, limit)
    return VisionLoad(
        units_per_image=units,
        images_per_request=load.images,
        tokens_per_request=load.images * rule.unit_tokens(units),
    )


class TrialChoice(NamedTuple):
    """Settings to try: the options that make the plan, the plan itself, and its forecast."""

    options: dict[str, Any]
    plan: Plan
    forecast: LoadForecast

    @property
    def rate(self) -> float:
        """The requests a second that the forecast expects."""
        return self.forecast.requests_per_second


def choices(
    request: PlanRequest,
    usual: Plan,
    load: LoadSpec,
    at_once: float,
    kv_types: Sequence[int] = (0,),
    *,
    prefix: bool = False,
) -> list[TrialChoice]:
    """Return all choices: first ``usual``, the plan without tuning, then the others.

    The others are in the order of their forecast, the fastest first. The person's own options do
    not change. ``prefix``: also try prefix caching, which may help this load.
    """
    found = {_kind(usual, at_once): TrialChoice({}, usual, forecast_of(usual, load, at_once))}
    options = _every(request, usual, kv_types, prefix=prefix)
    for choice in _fitting(request, usual, load, at_once, options):
        found.setdefault(_kind(choice.plan, at_once), choice)
    first, *others = found.values()
    return [first, *sorted(others, key=lambda choice: -choice.rate)]


def drafts_to_try(
    request: PlanRequest, usual: Plan, load: LoadSpec, at_once: float, tokens: Sequence[int]
) -> list[TrialChoice]:
    """Return the choices that differ in the tokens which a draft proposes; 0 is without a draft.

    The first is ``usual``. Without a draft, the plan may be on another engine. No forecast knows
    how many tokens are accepted: all are to be tried.
    """
    draft = usual.model.draft
    others: list[dict[str, Any]] = [
        {SPECULATIVE[2]: count} if count else dict.fromkeys(SPECULATIVE)
        for count in tokens
        if not draft or count != draft.tokens
    ]
    first = TrialChoice({}, usual, forecast_of(usual, load, at_once))
    return [first, *_fitting(request, usual, load, at_once, others)]


def _fitting(
    request: PlanRequest,
    usual: Plan,
    load: LoadSpec,
    at_once: float,
    every: Iterable[dict[str, Any]],
) -> Iterator[TrialChoice]:
    """Yield the choices among these options whose plans fit and keep the promise of ``usual``."""
    for options in every:
        with suppress(TurbofitError):
            plan = best_plan(request.changed(**options), promise=usual.promise)
            if plan.fits:
                yield TrialChoice(options, plan, forecast_of(plan, load, at_once))


def _every(
    request: PlanRequest, usual: Plan, kv_types: Sequence[int], *, prefix: bool
) -> Iterator[dict[str, Any]]:
    """Yield the options of all combinations of shapes and settings that the person left open."""
    given = request.given()
    planned: tuple[str, int, int] = (usual.backend.name, usual.tp, usual.replicas)
    shapes = {planned}
    shapes |= {(row.engine, row.tp, row.replicas) for row in usual.considered if row.fits}
    gpus, planned_cache = len(usual.machine.visible), usual.prefix_caching
    # Only shapes that use all cards; if none does, all that fit.
    whole = {shape for shape in shapes if shape[1] * shape[2] == gpus} or shapes
    axes: dict[str, Sequence[Any]] = {
        "max_prefill_token_num": _PREFILLS,
        "max_batch_size": _BATCHES,
        "quant_policy": kv_types,
        "enable_prefix_caching": (False, True) if prefix else (planned_cache,),
    }
    free = {name: values for name, values in axes.items() if name not in given}
    for engine, tp, replicas in sorted({planned, *whole}):
        shape = {"engine": engine, "tp": tp, "replicas": replicas}
        base = {name: value for name, value in shape.items() if given.get(name, "auto") == "auto"}
        for values in product(*free.values()):
            yield {**base, **dict(zip(free, values, strict=True))}


def _rows(plan: Plan, at_once: float) -> int:
    """Return how many requests of the load run at once in one engine's batch."""
    least = min(engine.settings.max_batch_size for engine in plan.engines)
    return min(least, math.ceil(at_once / plan.replicas))


def _kind(plan: Plan, at_once: float) -> tuple[object, ...]:
    """Return the settings that matter under the load; plans with the same settings are alike."""
    each = (
        (it.max_prefill_token_num, it.quant_policy, it.enable_prefix_caching)
        for it in (engine.settings for engine in plan.engines)
    )
    units = max(engine.units_per_forward for engine in plan.engines)
    return plan.backend.name, plan.tp, plan.replicas, _rows(plan, at_once), *each, units
