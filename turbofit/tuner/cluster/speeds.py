"""How fast a planned node is with so many requests there: the sum over its engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import ceil

from msgspec.structs import replace

from turbofit.core.plan import Plan
from turbofit.core.struct import Struct
from turbofit.memory.engines import engine_named
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.speed.rates import rates
from turbofit.tuner.speed.throughput import (
    BatchLimits,
    GroupRates,
    Speed,
    group_rates,
    speed_of,
    workload_of,
)

__all__ = ["ALMOST", "NodeSpeed"]

#: Shares that lie above a whole number by less than this are that number.
ALMOST = 1e-6


class _Like(Struct):
    """Engines of a node that are the same to the forecast; ``part`` is one's share of requests."""

    rates: GroupRates
    limits: BatchLimits
    part: float


class NodeSpeed:
    """The forecast of one planned node.

    Args:
        plan: what it runs.
        requested_load: the workload's vision load, before any limit was lowered for it.
        fixed_batch: ``max_batch_size`` is the user's, else it follows the requests.
    """

    def __init__(self, plan: Plan, requested_load: VisionLoad, *, fixed_batch: bool) -> None:
        self._requested_load, self._fixed = requested_load, fixed_batch
        known = plan.engine.of_lmdeploy
        self._likes: Counter[_Like] = Counter(_likes(plan) if known else ())

    def __call__(self, in_flight: float) -> Speed:
        """The node as one engine with so many requests; its batch follows them."""
        speeds = self._speeds(in_flight, follow=not self._fixed)
        return _whole(speeds)

    def engines(self, in_flight: float) -> list[Speed]:
        """Each engine's forecast with the planned batch; empty where there is no forecast."""
        return [
            speed
            for speed, count in self._speeds(in_flight, follow=False)
            for _ in range(count)
        ]  # fmt: skip

    def _speeds(self, in_flight: float, *, follow: bool) -> list[tuple[Speed, int]]:
        return [
            (self._one(like, in_flight * like.part, follow), n) for like, n in self._likes.items()
        ]

    def _one(self, like: _Like, in_flight: float, follow: bool) -> Speed:
        batch = max(1, ceil(in_flight - ALMOST)) if follow else like.limits.batch
        load = workload_of(self._requested_load, in_flight)
        return speed_of(like.rates, rates(), load, replace(like.limits, batch=batch))


def _likes(plan: Plan) -> Iterator[_Like]:
    engine, groups = engine_named(plan.engine.name), plan.parallel.groups
    total = sum(group_plan.at_once for group_plan in plan.by_group)
    for number, group in enumerate(groups):
        group_plan = plan.by_group[number] if plan.by_group else None
        settings = group_plan.settings if group_plan else plan.settings
        gpus = [plan.machine.gpu(index) for index in group]
        yield _Like(
            rates=group_rates(plan.model, settings, plan.machine, gpus, engine),
            limits=BatchLimits.of(settings, group_plan.kv.tokens if group_plan else plan.kv.tokens),
            part=group_plan.at_once / total if group_plan and total else 1 / len(groups),
        )


def _whole(speeds: list[tuple[Speed, int]]) -> Speed:
    """Engines side by side as one: rates add up, the slowest answer counts."""
    first = max((speed for speed, _ in speeds), key=lambda one: one.seconds_per_request)
    return replace(
        first,
        requests_per_second=sum(speed.requests_per_second * count for speed, count in speeds),
        running=sum(speed.running * count for speed, count in speeds),
    )
