"""What a cluster promises, and which kinds of nodes keep it.

The rules are the search's own. Images as large as were asked come first, and the whole context that
a plan promises, whatever they leave out: no node that joins makes these smaller. Then the goal's
value decides; then the longer context. Two things are of clusters alone: rates that differ by less
than the forecast's error count as equal, so that one weak node does not shorten the context of all
for no gain; and where no node serves the asked images the share of them that is served weighs
against the rate. Whether an engine must queue images is not part of the promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from turbofit.core.plan import Plan
from turbofit.core.struct import Struct
from turbofit.tuner.cluster.kind_planner import KindPlanner, Promise
from turbofit.tuner.resolved_request import vision_load_of
from turbofit.tuner.search.share import evenly, share_out
from turbofit.tuner.search.sizing import longest_context

__all__ = ["Choice", "choose", "even_shares", "shares_of"]

#: Rates that differ by less are the same to a forecast that is off by more.
_FORECAST_TOLERANCE: Final = 0.02
#: Limits and contexts that are tried, spread over what the kinds have.
_MOST_LIMITS: Final = 6
_MOST_CONTEXTS: Final = 8
_MOST_SUBSETS: Final = 8


class Choice(Struct):
    """A promise, the kinds that keep it with a node's share of requests each, and its worth.

    ``value`` is the goal's, ``served`` the share of the asked image that is admitted.
    """

    promise: Promise
    shares: dict[int, float]
    nodes: int
    value: float = 0.0
    served: float = 1.0

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return self.promise.context or 0


def even_shares(
    planner: KindPlanner, members: Iterable[int], promise: Promise | None = None
) -> dict[int, float]:
    """Requests of one node of each kind where every GPU gets as many, if its caches hold them.

    As many as its plan runs at once where nobody says how many there will be.
    """
    found = list(members)
    requests = planner.base.workload.concurrency
    if requests is None:
        plans = {k: planner.plan(k, 1.0).plan for k in found}
        return {k: float(plan.requests_at_once if plan else 1) for k, plan in plans.items()}
    kinds = [planner.kinds[k] for k in found]
    sets = [(len(kind.nodes), float(len(kind.machine.visible))) for kind in kinds]
    return planner.shares(found, lambda most: evenly(sets, requests, most), promise)


def shares_of(planner: KindPlanner, plans: dict[int, Plan], promise: Promise) -> dict[int, float]:
    """Requests of one node of each kind as the goal gives them; by GPUs without a forecast."""
    if len(plans) == 1 or any(plan.engine.serial for plan in plans.values()):
        return even_shares(planner, plans, promise)
    workload = planner.base.workload
    requests, goal = workload.concurrency, workload.goal
    if requests is None:
        return {k: float(plan.requests_at_once) for k, plan in plans.items()}
    sets = [(len(planner.kinds[k].nodes), planner.speed(plan)) for k, plan in plans.items()]
    return planner.shares(list(plans), lambda most: share_out(sets, requests, goal, most), promise)


def choose(planner: KindPlanner, alone: dict[int, Plan]) -> tuple[Choice, tuple[Choice, ...]]:
    """The best promise, and all that were weighed.

    Where none of them holds all requests at once, the one that holds the most.

    Args:
        planner: the kinds.
        alone: the plans of those that serve by themselves, with their even shares.
    """
    found = [one for limit in _limits(planner, alone) for one in _with_limit(planner, alone, limit)]
    whole = longest_context(planner.base)
    enough = [one for one in found if planner.holds_all(one.shares)]
    if not enough:
        return max(found, key=lambda one: planner.at_once(one.shares)), tuple(found)
    kept = [one for one in enough if one.context >= whole] or enough
    best = max(one.served * one.value for one in kept)
    tolerance = _FORECAST_TOLERANCE if planner.base.workload.goal == "throughput" else 0.0
    equal = [one for one in kept if one.served * one.value >= best * (1 - tolerance)]
    equal.sort(key=lambda one: (one.served, one.context, one.nodes, one.value), reverse=True)
    agreed = []
    for one in (*equal, *enough):
        agreed.append(_agreed(planner, one))
        if planner.holds_all(agreed[-1].shares):
            return agreed[-1], tuple(found)
    return max(agreed, key=lambda one: planner.at_once(one.shares)), tuple(found)


def _limits(planner: KindPlanner, alone: dict[int, Plan]) -> list[int | None]:
    """The asked limit where any kind serves it; else what kinds reach, the largest first."""
    found = {plan.limits.image_limit for plan in alone.values()}
    reached = sorted((limit for limit in found if limit is not None), reverse=True)
    if not reached:
        return [None]
    if planner.base.requested_limit in reached or not planner.limit_free:
        return [reached[0]]
    return list(_spread(reached, _MOST_LIMITS))


def _with_limit(planner: KindPlanner, alone: dict[int, Plan], limit: int | None) -> list[Choice]:
    """Promises with one limit: each context that some kind ends at."""
    shares = even_shares(planner, alone, Promise(limit=limit))
    plans: dict[int, Plan] = {}
    for k, plan in alone.items():
        reached = plan.limits.image_limit
        if limit is None or (reached is not None and reached >= limit):
            tried = planner.plan(k, shares[k], Promise(limit=limit))
            if not tried.why_not:
                plans[k] = tried.serves
    longest = {k: plan.kv.longest_request_tokens for k, plan in plans.items()}
    requested = planner.base.workload.context
    contexts = [requested] if requested else _spread(sorted(set(longest.values())), _MOST_CONTEXTS)
    found = []
    for context in contexts:
        members = {k: plan for k, plan in plans.items() if longest[k] >= context}
        found += [_weighed(planner, some, limit, context) for some in _subsets(planner, members)]
    return found


def _subsets(planner: KindPlanner, members: dict[int, Plan]) -> list[dict[int, Plan]]:
    """All of them; for the shortest answer also without the slowest ones."""
    if planner.base.workload.goal != "latency" or len(members) < 2:
        return [members]
    shares = even_shares(planner, members)
    if any(plan.engine.serial for plan in members.values()):
        return [members]
    order = sorted(members, key=lambda k: planner.speed(members[k])(shares[k]).seconds_per_request)
    sizes = _spread(range(1, len(order) + 1), _MOST_SUBSETS)
    return [{k: members[k] for k in order[:size]} for size in sizes]


def _weighed(
    planner: KindPlanner, plans: dict[int, Plan], limit: int | None, context: int
) -> Choice:
    promise = Promise(limit=limit, context=context)
    choice = Choice(
        promise=promise,
        shares=shares_of(planner, plans, promise),
        nodes=sum(len(planner.kinds[k].nodes) for k in plans),
        served=_served(planner, limit),
    )
    return replace(choice, value=_value(planner, plans, choice.shares))


def _served(planner: KindPlanner, limit: int | None) -> float:
    """The share of the asked image's units that is admitted."""
    requested_load = planner.requested_load.units_per_request
    if limit is None or not requested_load:
        return 1.0
    return vision_load_of(planner.base, limit).units_per_request / requested_load


def _value(planner: KindPlanner, plans: dict[int, Plan], shares: dict[int, float]) -> float:
    """The goal's value of kinds side by side."""
    goal = planner.base.workload.goal
    if goal == "context":
        return float(min(plan.kv.tokens for plan in plans.values()))
    if any(plan.engine.serial for plan in plans.values()):
        engines = sum(p.parallel.replicas * len(planner.kinds[k].nodes) for k, p in plans.items())
        return float(engines)
    speeds = {k: planner.speed(plan)(shares[k]) for k, plan in plans.items()}
    if goal == "latency":
        return 1 / max(speed.seconds_per_request for speed in speeds.values())
    return sum(s.requests_per_second * len(planner.kinds[k].nodes) for k, s in speeds.items())


def _agreed(planner: KindPlanner, choice: Choice) -> Choice:
    """The choice as its own plans keep it; without shares where none does.

    A larger share makes a larger batch, and that leaves a little less cache: the context is lowered
    to what all hold where nobody asked for it, else the kinds that do not hold it are left out.
    """
    promise, shares = choice.promise, choice.shares
    while shares:
        tried = {k: planner.plan(k, share, promise) for k, share in shares.items()}
        short = {k for k, one in tried.items() if one.why_not or not _holds(one.serves, promise)}
        if not short:
            return _final(planner, promise, {k: one.serves for k, one in tried.items()}, shares)
        free = not planner.base.context_given
        held = _held(planner, promise, shares, short) if free else {}
        if held and min(held.values()) < (promise.context or 0):
            promise = replace(promise, context=min(held.values()))
            short -= set(held)
        rest = {k: one.serves for k, one in tried.items() if k not in short and one.plan}
        if short:
            shares = shares_of(planner, rest, promise) if rest else {}
    return replace(choice, shares={})


def _held(
    planner: KindPlanner, promise: Promise, shares: dict[int, float], short: set[int]
) -> dict[int, int]:
    """The longest context of each kind that does not hold the promised one."""
    free = {k: planner.plan(k, shares[k], Promise(limit=promise.limit)) for k in short}
    return {k: one.serves.kv.longest_request_tokens for k, one in free.items() if not one.why_not}


def _holds(plan: Plan, promise: Promise) -> bool:
    return plan.kv.longest_request_tokens >= (promise.context or 0)


def _final(
    planner: KindPlanner, promise: Promise, plans: dict[int, Plan], shares: dict[int, float]
) -> Choice:
    kept = {k: shares[k] for k in plans}
    return Choice(
        promise=promise,
        shares=kept,
        nodes=sum(len(planner.kinds[k].nodes) for k in plans),
        value=_value(planner, plans, kept),
        served=_served(planner, promise.limit),
    )


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of sorted values, both ends among them."""
    if len(values) <= most:
        return list(values)
    step = (len(values) - 1) / (most - 1)
    return [values[round(k * step)] for k in range(most)]
