"""Finds for how many clients a plan keeps an SLO, on pretend GPUs with a clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from turbofit.core.tuning import Capacity, CapacityLoad
from turbofit.measure.tune_runner import meets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from turbofit.core.tuning import SpeedFigures
    from turbofit.measure.load.spec import LoadSpec
    from turbofit.measure.tune_runner import Loads

#: The most loads with a number of clients at once, which come first.
_CLIENTS: Final = 4
#: The most loads with a rate of requests, which come next.
_RATES: Final = 2
#: Factors of the next load's rate: after a load that kept the SLO, and after one that did not.
_HIGHER, _LOWER = 1.15, 0.8
#: The fewest requests of a load at a rate.
_LEAST: Final = 12


class CapacitySearch:
    """Chooses at most six loads, each by the results of the loads before.

    ``load``: the requests that all loads have. ``first``: the number of clients to begin with;
    ``most``: the largest number to try. ``host_rate``: the most requests a second for which the
    host prepares images.
    """

    def __init__(
        self,
        load: LoadSpec,
        slo: Mapping[str, float],
        *,
        first: int,
        most: int,
        host_rate: float = math.inf,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._load, self._slo, self._say = load, slo, say
        self._first, self._most, self._host_rate = first, most, host_rate
        self._tried: list[CapacityLoad] = []
        #: The most clients that kept the SLO, and the fewest that did not.
        self._good, self._bad = 0, most + 1
        #: Why the last load has no figures; empty if it has figures.
        self._why = ""

    def loads(self) -> Loads:
        """Yield the loads; the caller sends how each load ended."""
        clients, rate = max(1, min(self._first, self._most)), 0.0
        for _ in range(_CLIENTS):
            if not self._good < clients < self._bad:
                break
            yield from self._load_of(clients=clients)
            if self._why:
                return
            if self._tried[-1].keeps:
                # A load at a rate begins conversations, each of which has all turns.
                rate = self._tried[-1].measured.requests_per_second / self._load.turns
                self._good = clients
            else:
                self._bad = clients
            clients = self._next()
        for _ in range(_RATES if rate else 0):
            yield from self._load_of(rate=float(f"{rate:.3g}"))
            if self._why:
                return
            rate *= _HIGHER if self._tried[-1].keeps else _LOWER

    def _next(self) -> int:
        """Return the clients to try next: twice as many, or between kept and missed SLO."""
        if self._bad > self._most:
            return min(2 * self._good, self._most)
        return round(math.sqrt(max(self._good, self._bad / 4) * self._bad))

    def _load_of(self, *, clients: int | None = None, rate: float | None = None) -> Loads:
        """Yield one load, and note whether it kept the SLO."""
        load = self._load.changed(concurrency=clients, rate=rate)
        if rate is not None and load.seconds is not None:
            load = load.changed(seconds=max(load.seconds, _LEAST / rate))
        figures, _, self._why = yield load
        if figures is None:
            return
        within = figures.requests_per_second <= self._host_rate
        keeps = within and meets(figures, self._slo)
        self._tried.append(CapacityLoad(clients=clients, rate=rate, measured=figures, keeps=keeps))
        what = "requests" if load.turns == 1 else "conversations"
        how = f"{clients} at once" if rate is None else f"{rate:g} {what} a second"
        bound = "" if within else f": the host prepares images for {self._host_rate:.3g}/s at most"
        self._say(f"{how}: {'kept' if keeps else 'not kept'}{bound}")

    def found(self) -> Capacity:
        """Return the most clients and the largest rate that kept the SLO, with all loads."""
        rates = [load.rate for load in self._tried if load.rate is not None and load.keeps]
        return Capacity(
            clients=self._good,
            more=self._good > 0 and self._bad > self._most,
            rate=max(rates, default=None),
            loads=tuple(self._tried),
            why=self._why,
        )


def within_host(figures: SpeedFigures, rate: float) -> SpeedFigures:
    """Return the figures for at most ``rate`` requests a second, which the host can prepare."""
    share = min(1.0, rate / max(figures.requests_per_second, 1e-9))
    return replace(
        figures,
        requests_per_second=share * figures.requests_per_second,
        output_tokens_per_second=share * figures.output_tokens_per_second,
    )
