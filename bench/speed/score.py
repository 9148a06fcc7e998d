"""Computes the errors of forecasts, how they order settings, and the best batches of curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import ceil, log
from statistics import fmean, median

from bench.speed.forecast import Setup, forecast, images_forecast
from turbofit.core.struct import Struct
from turbofit.planning.speed import Rates

#: Figures that are closer than this are a tie, which no forecast has to order.
_TIE = 0.02
#: A curve has at least so many batches.
_POINTS = 3


class Score(Struct):
    """A row's forecast and published requests or tokens a second, and seconds to a first token."""

    setup: Setup
    forecast: float
    published: float
    first_token: float

    @property
    def error(self) -> float:
        """Forecast over published, less one: plus is too fast."""
        return self.forecast / self.published - 1

    @property
    def times_off(self) -> float:
        """The larger of forecast and published over the smaller."""
        return max(self.forecast / self.published, self.published / self.forecast)


class Curve(Struct):
    """The best batch of one setting by the forecast and by the published figures."""

    name: str
    forecast: int
    published: int

    @property
    def held(self) -> bool:
        """Whether the forecast is within a factor of two."""
        return self.published / 2 <= self.forecast <= self.published * 2


def score(setup: Setup, figures: Rates) -> Score:
    """Score one row with these constants."""
    row = setup.row
    if row.sizes:
        rate, published = images_forecast(setup, figures), row.requests_per_second or 0.0
        return Score(setup=setup, forecast=rate, published=published, first_token=0.0)
    found = forecast(setup, figures)
    if row.requests_per_second is not None:
        rate, published = found.requests_per_second, row.requests_per_second
    else:
        rate = found.requests_per_second * row.output
        published = row.output_tokens_per_second or 0.0
    first = found.seconds_to_first_token
    if setup.at_once == 1 and row.prompt <= 1:  # nothing to read: the first token is a step's
        first = found.step
    elif row.together:  # the engine answers when all prefills are done
        first = found.running * found.prefill + found.step
        first += (setup.at_once - found.running) / found.requests_per_second
    elif row.prompts is not None:  # the first of all wait for each other, as many as are there
        first += found.prefill * setup.at_once**2 / 2 / row.prompts
    return Score(setup=setup, forecast=rate, published=published, first_token=first)


def loss(setups: Sequence[Setup], figures: Rates) -> float:
    """Return the mean over sources of the mean absolute log-ratio of their rows."""
    errors: dict[str, list[float]] = defaultdict(list)
    for one in setups:
        found = score(one, figures)
        errors[one.row.source].append(abs(log(found.forecast / found.published)))
    return fmean(fmean(each) for each in errors.values())


def median_of(scores: Iterable[Score]) -> float:
    """The median of absolute errors."""
    return median(abs(one.error) for one in scores)


def p90_of(scores: Iterable[Score]) -> float:
    """Return the least error that nine of ten scores do not exceed."""
    errors = sorted(abs(one.error) for one in scores)
    return errors[ceil(0.9 * len(errors)) - 1]


def order(scores: Iterable[Score]) -> tuple[int, int]:
    """Return how many pairs of rows the forecast orders as published, and how many there are.

    A pair has one source, model, card and engine, and figures that are no tie.
    """
    alike = defaultdict(list)
    for one in scores:
        row = one.setup.row
        unit = row.requests_per_second is not None
        alike[row.source, row.engine, row.model, row.card, unit].append(one)
    right = pairs = 0
    for group in alike.values():
        for a, b in combinations(group, 2):
            if abs(log(a.published / b.published)) > _TIE:
                pairs += 1
                right += (a.forecast - b.forecast) * (a.published - b.published) > 0
    return right, pairs


def curves(scores: Iterable[Score]) -> list[Curve]:
    """Return the best batch of every setting that was measured at several batches."""
    settings = defaultdict(list)
    for one in scores:
        row = one.setup.row
        lengths = "" if row.assumed_lengths else f" {row.prompt:g}+{row.output:g}"
        if row.concurrency is not None:
            name = f"{row.engine} {row.version} {row.name}{lengths}"
            settings[name, row.card, row.quant_policy].append(one)
    return [
        Curve(name=name, forecast=_best(group, "forecast"), published=_best(group, "published"))
        for (name, *_), group in settings.items()
        if len({one.setup.at_once for one in group}) >= _POINTS
    ]


def _best(group: Sequence[Score], figure: str) -> int:
    """Return the smallest batch whose figure ties with the largest figure."""
    most = max(getattr(one, figure) for one in group)
    return min(one.setup.at_once for one in group if getattr(one, figure) > most / (1 + _TIE))
