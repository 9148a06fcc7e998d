"""How many of the workload's requests go to each of unequal engines.

For the most requests a second each next share goes where it adds most; for the shortest answer
where it is answered soonest. Both are optimal, since an engine's rate grows more slowly with each
further request, and its answers take longer. No engine gets more than its cache holds: the others
get the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from turbofit.core.plan import Goal
from turbofit.tuner.speed.throughput import Speed

__all__ = ["evenly", "held_shares", "share_out"]

#: Shares that the workload is cut into: at least so many, and so many for each engine.
_SHARES = 32
_EACH = 4
#: A rate that grows by less than this share of itself does not grow.
_GROWS = 1e-9

#: A set of like engines: how many, and one's speed with so many requests there.
Set = tuple[int, Callable[[float], Speed]]


def held_shares(
    shared: Callable[[Sequence[float]], list[float]], held: Callable[[int, float], float], sets: int
) -> list[float]:
    """Requests at each engine of each set, of which its cache holds all.

    The sum is smaller than what is shared out where all caches together hold no more.

    Args:
        shared: shares the requests out, given the most for an engine of each set.
        held: what an engine of a set holds of a share, in whole requests.
        sets: how many there are.
    """
    most = [inf] * sets
    while True:
        shares = shared(most)
        found = [held(number, share) for number, share in enumerate(shares)]
        if all(one >= share for one, share in zip(found, shares, strict=True)):
            return shares
        most = [
            one if one < share else before
            for one, share, before in zip(found, shares, most, strict=True)
        ]


def evenly(
    sets: Sequence[tuple[int, float]], requests: float, most: Sequence[float] = ()
) -> list[float]:
    """Requests at each engine of each set in proportion to its weight, up to the most.

    Args:
        sets: how many engines, and the weight of each.
        requests: over all engines.
        most: for an engine of each set; empty where there is no bound.
    """
    bounds = list(most or [inf] * len(sets))
    open_, left = dict(enumerate(sets)), requests
    while open_:
        weights = sum(count * weight for count, weight in open_.values())
        level = {i: left * weight / weights for i, (_, weight) in open_.items()}
        full = [i for i in open_ if bounds[i] < level[i]]
        if not full:
            return [level.get(i, bound) for i, bound in enumerate(bounds)]
        left -= sum(open_.pop(i)[0] * bounds[i] for i in full)
    return bounds


def share_out(
    sets: Sequence[Set], concurrency: int, goal: Goal, most: Sequence[float] = ()
) -> list[float]:
    """Average requests in flight at each engine of each set; every engine gets some.

    Args:
        sets: the engines; of those that would gain the same, earlier ones go first.
        concurrency: requests over all engines.
        goal: what is weighed; ``context`` as ``throughput``.
        most: as for :func:`evenly`.
    """
    engines = sum(count for count, _ in sets)
    cuts = max(_SHARES, _EACH * engines)
    bounds = most or [inf] * len(sets)
    curves = [
        _Curve(count, speed, concurrency / cuts, bound)
        for (count, speed), bound in zip(sets, bounds, strict=True)
    ]
    for _ in range(cuts - engines):
        open_ = [curve for curve in curves if curve.has_room]
        if not open_:
            break
        if goal == "latency":
            best = min(open_, key=lambda one: one.more.seconds_per_request)
        else:
            best = max(open_, key=lambda one: (one.gain, -one.more.seconds_per_request))
        best.take()
    shares = [curve.in_flight for curve in curves]
    if all(curve.has_room for curve in curves):
        return shares
    counts = [count for count, _ in sets]
    left = concurrency - sum(count * share for count, share in zip(counts, shares, strict=True))
    room = [bound - share for bound, share in zip(bounds, shares, strict=True)]
    more = evenly([(count, 1.0) for count in counts], left, room)
    return [share + one for share, one in zip(shares, more, strict=True)]


class _Curve:
    """Like engines that are filled share by share, all of them alike, up to the most of each."""

    def __init__(
        self, count: int, speed: Callable[[float], Speed], share: float, most: float
    ) -> None:
        self._count, self._speed, self._step, self._most = count, speed, share / count, most
        self.in_flight = share = min(share, most)
        self._now = speed(share)
        self.more = speed(share + self._step)

    @property
    def has_room(self) -> bool:
        """Whether each holds the next share."""
        return self.in_flight + self._step <= self._most

    @property
    def gain(self) -> float:
        """Requests a second that the next share adds over all of them."""
        now, more = self._now.requests_per_second, self.more.requests_per_second
        return (more - now) * self._count if more > now * (1 + _GROWS) else 0.0

    def take(self) -> None:
        """Take the next share."""
        self.in_flight += self._step
        self._now, self.more = self.more, self._speed(self.in_flight + self._step)
