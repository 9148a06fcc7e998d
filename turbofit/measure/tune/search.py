"""Says which settings to try next, and whether what was measured keeps the SLO.

An SLO, such as ``ttft=2s,tpot=50ms``, limits the times of 90 % of the requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.core.units import parse_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.core.tuning import SpeedFigures, TrialForecast, TrialRecord
    from turbofit.measure.tune.space import TrialChoice


#: The times that an SLO can limit, and the measured figure that must stay below each limit.
LIMITS: Final = {"ttft": "ttft_p90", "tpot": "tpot_p90", "e2e": "e2e_p90"}
#: The share of failed requests that is tolerated without another limit.
_FAILING: Final = 0.01


def parse_slo(text: str) -> dict[str, float]:
    """Seconds by the name of the limit; a `UsageError` if an entry is no limit or stands twice."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign or name not in LIMITS or name in limits:
            raise UsageError(
                f"--slo {part.strip()!r} is no limit, or stands twice",
                hint="write it as ttft=2s,tpot=50ms,e2e=20s",
            )
        limits[name] = parse_seconds(value, f"--slo {name}")
    return limits


def meets(figures: SpeedFigures, slo: Mapping[str, float]) -> bool:
    """Whether measured figures keep the limits, and nearly all requests were answered."""
    every = figures.answered + figures.failed
    if not figures.answered or figures.failed > _FAILING * every:
        return False
    return all(getattr(figures, LIMITS[name]) <= limit for name, limit in slo.items())


def order(
    left: Sequence[TrialChoice],
    measured: TrialRecord | None,
    slo: Mapping[str, float],
    at_once: int,
) -> list[TrialChoice]:
    """The choices, the most promising first.

    That is the highest forecast of those that keep the SLO if forecasts of times are wrong by the
    same factors as for the settings that were ``measured``; then those that miss it least.
    """

    def times(forecast: TrialForecast) -> dict[str, float]:
        e2e = at_once / max(forecast.requests_per_second, 1e-9)
        return {"ttft": forecast.ttft, "tpot": forecast.tpot, "e2e": e2e}

    factors = dict.fromkeys(LIMITS, 1.0)
    if measured is not None and measured.measured is not None:
        told = times(measured.forecast)
        factors = {
            name: getattr(measured.measured, figure) / max(told[name], 1e-6)
            for name, figure in LIMITS.items()
        }

    def promise(choice: TrialChoice) -> tuple[float, float]:
        told = times(choice.forecast)
        missed = max((told[name] * factors[name] / limit for name, limit in slo.items()), default=0)
        return -max(1.0, missed), choice.rate

    return sorted(left, key=promise, reverse=True)
