"""How many of the workload's requests go to each of unequal engines.

For the most requests a second each next share goes where it adds most; for the shortest answer
where it is answered soonest. Both are optimal, since an engine's rate grows more slowly with each
further request, and its answers take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from turbofit.core.plan import Goal
from turbofit.tuner.speed.throughput import Speed

__all__ = ["share_out"]

#: Shares that the workload is cut into: at least so many, and so many for each engine.
_SHARES = 32
_EACH = 4
#: A rate that grows by less than this share of itself does not grow.
_GROWS = 1e-9

#: A set of like engines: how many, and one's speed with so many requests there.
Set = tuple[int, Callable[[float], Speed]]


def share_out(sets: Sequence[Set], concurrency: int, goal: Goal) -> list[float]:
    """Average requests in flight at each engine of each set; every engine gets some.

    Args:
        sets: the engines; of those that would gain the same, earlier ones go first.
        concurrency: requests over all engines.
        goal: what is weighed; ``context`` as ``throughput``.
    """
    engines = sum(count for count, _ in sets)
    cuts = max(_SHARES, _EACH * engines)
    share = concurrency / cuts
    curves = [_Curve(count, speed, share) for count, speed in sets]
    for _ in range(cuts - engines):
        if goal == "latency":
            best = min(curves, key=lambda one: one.more.seconds_per_request)
        else:
            best = max(curves, key=lambda one: (one.gain, -one.more.seconds_per_request))
        best.take()
    return [curve.in_flight for curve in curves]


class _Curve:
    """Like engines that are filled share by share, all of them alike."""

    def __init__(self, count: int, speed: Callable[[float], Speed], share: float) -> None:
        self._count, self._speed, self._step = count, speed, share / count
        self.in_flight = share
        self._now = speed(share)
        self.more = speed(share + self._step)

    @property
    def gain(self) -> float:
        """Requests a second that the next share adds over all of them."""
        now, more = self._now.requests_per_second, self.more.requests_per_second
        return (more - now) * self._count if more > now * (1 + _GROWS) else 0.0

    def take(self) -> None:
        """Take the next share."""
        self.in_flight += self._step
        self._now, self.more = self.more, self._speed(self.in_flight + self._step)
