"""What the model of speed says of a plan under a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from turbofit.core.tuning import TrialForecast
from turbofit.load.trace import read_trace
from turbofit.memory.engines import engine_named
from turbofit.memory.vision_load import NO_IMAGES, VisionLoad
from turbofit.tuner.speed.rates import rates
from turbofit.tuner.speed.throughput import BatchLimits, ClosedLoad, group_rates, speed_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbofit.core.plan import Plan
    from turbofit.load.spec import LoadSpec

__all__ = ["MeanRequest", "forecast_of", "mean_request"]


class MeanRequest(NamedTuple):
    """A load's request on average; ``images`` are the sizes of one, or of several alike."""

    text_tokens: int
    output_tokens: int
    images: tuple[tuple[int, int], ...]


def mean_request(spec: LoadSpec) -> MeanRequest:
    """The request of a load; of a trace its mean, and the images of the request in its middle.

    Raises:
        UsageError: the trace cannot be read.
    """
    if spec.trace is None:
        size = max(spec.image_size, key=lambda one: one[0] * one[1])
        return MeanRequest(spec.prompt_tokens, spec.output_tokens, (size,) * spec.images)
    trace = read_trace(spec.trace)
    by_images = sorted(trace, key=lambda one: sum(w * h for w, h in one.images))
    return MeanRequest(
        _mean([one.text_tokens for one in trace]),
        _mean([one.output_tokens for one in trace]),
        by_images[len(by_images) // 2].images,
    )


def forecast_of(plan: Plan, request: MeanRequest, at_once: float) -> TrialForecast:
    """Of all engines of a plan, with so many requests at once in all."""
    engine, images = engine_named(plan.engine.name), _vision_load(plan, request)
    load = ClosedLoad(
        prompt=request.text_tokens + images.tokens_per_request,
        output=request.output_tokens,
        at_once=at_once / len(plan.parallel.groups),
        images=images,
    )
    rate, ttft, tpot = 0.0, 0.0, 0.0
    for group, one in zip(plan.parallel.groups, plan.each(), strict=True):
        settings, gpus = one.settings, [plan.machine.gpu(index) for index in group]
        here = group_rates(plan.model, settings, plan.machine, gpus, engine)
        speed = speed_of(here, rates(), load, BatchLimits.of(settings, one.kv.tokens))
        rate += speed.requests_per_second
        ttft = max(ttft, speed.seconds_to_first_token)
        # A row waits for the prefills of others between its steps.
        taken = speed.running / max(speed.requests_per_second, 1e-9) - speed.prefill
        tpot = max(tpot, taken / request.output_tokens, speed.step)
    return TrialForecast(requests_per_second=rate, ttft=ttft, tpot=tpot)


def _vision_load(plan: Plan, request: MeanRequest) -> VisionLoad:
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    if rule is None or not request.images:
        return NO_IMAGES
    units = [rule.units(width, height, limit) for width, height in request.images]
    return VisionLoad(
        units_per_image=max(units),
        images_per_request=len(units),
        tokens_per_request=sum(rule.unit_tokens(one) for one in units),
    )


def _mean(values: Sequence[int]) -> int:
    return max(1, round(sum(values) / max(1, len(values))))
