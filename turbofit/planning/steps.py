"""Puts an engine's timed seconds in place of the constants of a forecast.

`turbofit calibrate` times forwards. Each figure of the forecast is multiplied by the ratio of the
measured to the forecast seconds. The ratio is interpolated between two timed forwards, and constant
beyond the first and the last one. The ratios are of one model, engine and card. `card_rates.py`
derives rates of the card for other models from the same forwards.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, permutations
from math import log
from statistics import fmean
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.machine import MeasuredSteps, StepPoint
from turbofit.core.struct import Struct
from turbofit.core.units import grouped, three_digits

#: A larger forward may be faster by this share plus both spreads; else the two forwards contradict
#: each other.
_NOISE: Final = 0.05
#: Bounds of a ratio of measured to forecast seconds; beyond them the card was timed wrongly.
_LEAST: Final = 0.01
_MOST: Final = 100.0

Curve = tuple[tuple[float, float], ...]


class StepRatios(Struct):
    """Measured seconds divided by forecast seconds; all 1 if nothing was timed.

    ``forward`` has the ratios by the number of tokens in a forward, ``image`` by the number of
    vision units of an image; ``source`` says what was timed, where and when, and is empty if
    nothing was.
    """

    forward: Curve = ()
    image: Curve = ()
    pair: float = 1.0
    context: float = 1.0
    source: str = ""


def ratio_at(curve: Curve, place: float) -> float:
    """Return a curve's ratio at a place: interpolated by logarithm, constant beyond the ends."""
    if not curve:
        return 1.0
    above = bisect_left(curve, (place, 0.0))
    if above in (0, len(curve)):
        return curve[min(above, len(curve) - 1)][1]
    (low, first), (high, second) = curve[above - 1], curve[above]
    return first + (second - first) * log(place / low) / log(high / low)


def ratios_of(
    steps: MeasuredSteps,
    *,
    forward: Callable[[float], float],
    tower: Callable[[float], float],
    pair: float,
    context: float,
) -> StepRatios:
    """Return the ratios of timed forwards; a forecast with these ratios gives the timed seconds.

    ``forward`` returns the forecast's seconds of a forward over a number of tokens, without
    attention, and ``tower`` those of an image of a number of vision units. ``pair`` is the
    forecast's seconds of the attention of one token of a prompt to another token, ``context`` those
    of reading a cached token.

    Timed prompts do not separate attention from matrix products: the longest prompt has one ratio
    for both.

    Raises:
        UsageError: two forwards contradict each other.
    """
    refuse_contradictions(steps)
    decoded, prompts, images = by_work(steps)
    cached = slope_of(decoded) or context
    longest = max(prompts, key=lambda point: point.prompt, default=None)
    of_pair = 1.0
    if longest is not None:
        forecast = forward(tokens_of(longest)) + pairs_of(longest) * pair
        of_pair = _bounded((longest.seconds - longest.cached * cached) / forecast)

    def attention(point: StepPoint) -> float:
        return point.cached * cached + pairs_of(point) * of_pair * pair

    curve = _curve(
        (tokens_of(point), (point.seconds - attention(point)) / forward(tokens_of(point)))
        for point in (*decoded, *prompts)
    )

    def alone(point: StepPoint) -> float:
        """Return the seconds that a timed image takes beyond the forward over its tokens."""
        tokens = tokens_of(point)
        return point.seconds - attention(point) - forward(tokens) * ratio_at(curve, tokens)

    return StepRatios(
        forward=curve,
        image=_curve((point.units, alone(point) / tower(point.units)) for point in images),
        pair=of_pair,
        context=_bounded(cached / context),
    )


def refuse_contradictions(steps: MeasuredSteps) -> None:
    """Refuse two forwards if one does at least the work of the other in clearly less time.

    Raises:
        UsageError: the first two such forwards.
    """
    for first, second in permutations(steps.points, 2):
        more = all(b >= a for a, b in zip(_work(first), _work(second), strict=True))
        noise = _NOISE + first.spread + second.spread
        if more and second.seconds * (1 + noise) < first.seconds:
            raise UsageError(
                f"timed steps contradict each other: {second.words} took"
                f" {three_digits(1e3 * second.seconds)} ms, {first.words}"
                f" {three_digits(1e3 * first.seconds)} ms",
                hint="turbofit calibrate MODEL, while nothing else uses the card",
            )


def by_work(steps: MeasuredSteps) -> tuple[list[StepPoint], list[StepPoint], list[StepPoint]]:
    """Return three lists of forwards: without a prompt, with a text prompt, and with an image."""
    decoded = [point for point in steps.points if not (point.prompt or point.units)]
    prompts = [point for point in steps.points if point.prompt and not point.units]
    return decoded, prompts, [point for point in steps.points if point.units]


def _work(point: StepPoint) -> tuple[int, ...]:
    return (point.sequences, point.cached, point.prompt, point.units)


def tokens_of(point: StepPoint) -> int:
    """Return the tokens that a forward computes."""
    return point.sequences + point.prompt


def pairs_of(point: StepPoint) -> float:
    """Return the pairs of a prompt's token and a token that it attends to."""
    return point.prompt**2 / 2


def slope_of(points: Sequence[StepPoint]) -> float:
    """Return the seconds of a cached token by least squares over equal numbers of sequences.

    The result is 0 if no two such forwards differ, or if larger contexts take no more time.
    """
    pairs = [(a, b) for a, b in combinations(points, 2) if a.sequences == b.sequences]
    more = sum((b.cached - a.cached) ** 2 for a, b in pairs)
    seconds = sum((b.cached - a.cached) * (b.seconds - a.seconds) for a, b in pairs)
    return max(0.0, seconds / more) if more else 0.0


def _curve(ratios: Iterable[tuple[float, float]]) -> Curve:
    """Return the mean ratio of each place, in the order of places."""
    found = grouped((place, _bounded(ratio)) for place, ratio in ratios)
    return tuple((place, fmean(found[place])) for place in sorted(found))


def _bounded(ratio: float) -> float:
    return min(max(ratio, _LEAST), _MOST)
