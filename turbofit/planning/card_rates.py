"""Derives the rates of cards from the timed forwards of one model, for plans of other models.

The time of a forward is the time of its work at a rate, plus the time of its kernel launches. A
timed forward does not separate the two times. The launches may take half as long as the constants
say, or half as long again. This uncertainty counts in the spread of a rate. A rate with a large
spread is not kept: for example, small models on fast cards do not show how fast weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from math import inf, sqrt
from statistics import median
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, MeasuredRate, MeasuredSteps, RateName, StepPoint
from turbofit.core.units import three_digits
from turbofit.planning.speed import GroupRates
from turbofit.planning.steps import by_work, pairs_of, slope_of, tokens_of

#: The largest spread of a rate that is kept.
_MOST_SPREAD: Final = 0.25
#: The share by which the time of launches may differ from the constants. On an H200, the steps of
#: Qwen2-VL-2B and InternVL2-8B leave 0.46 and 0.72 of the constants' launch time (bench/gpu).
_LAUNCHES: Final = 0.5
#: Up to this many sequences, the reading of weights limits a forward, on any card.
_FEW: Final = 8
#: Computing limits a prompt if the prompt takes this many times as long as a step of one sequence.
_COMPUTES: Final = 2.0
#: A step shows how fast weights are read if the cache takes at most this share of the step.
_MOST_CACHE: Final = 0.1
#: The work whose rate is derived, in words with a place for the figure.
_WORK: Final[dict[RateName, str]] = {
    "bandwidth": "it reads weights at {} GB/s",
    "cache_bandwidth": "it reads keys and values at {} GB/s",
    "flops": "it computes prompts at {} GFLOP/s",
    "vision_flops": "it encodes images at {} GFLOP/s",
}

#: The least, the likely and the largest rate that one timed forward allows.
Ends = tuple[float, float, float]


def rates_of(
    group: GroupRates, steps: MeasuredSteps, launches: Callable[[float], float]
) -> tuple[MeasuredRate, ...]:
    """Return the rates of a group's cards that these forwards determine.

    ``group`` has the constants' rates and the model's work. ``launches`` returns the constants'
    seconds of all kernel launches in a forward over a number of tokens.
    """
    decoded, prompts, images = by_work(steps)
    slope, work = slope_of(decoded), group.work

    def at_rate(point: StepPoint, amount: float) -> Ends:
        """Return the possible rates of a timed forward that reads or computes ``amount``.

        ``amount`` is in bytes or FLOPs. A rate is infinite if launches and cache may take the whole
        time of the forward.
        """
        ends = []
        for sign in (1, 0, -1):
            seconds = point.seconds * (1 + sign * point.spread) - point.cached * slope
            seconds -= (1 - sign * _LAUNCHES) * launches(tokens_of(point))
            ends.append(amount / seconds if seconds > 0 else inf)
        return ends[0], ends[1], ends[2]

    def flops(point: StepPoint) -> float:
        return tokens_of(point) * work.token_flops + pairs_of(point) * work.pair_flops

    found = (
        _rate("bandwidth", (at_rate(point, work.weights) for point in _reading(decoded, slope))),
        _rate("cache_bandwidth", _cache(decoded, slope, work.kv_read_bytes)),
        _rate("flops", (at_rate(point, flops(point)) for point in _computing(prompts, decoded))),
        _rate("vision_flops", _vision(group, steps, prompts, images)),
    )
    return tuple(rate for rate in found if rate is not None)


def _reading(decoded: Iterable[StepPoint], slope: float) -> list[StepPoint]:
    """Return the steps whose time shows how fast weights are read: few sequences, little cache."""
    few = (point for point in decoded if point.sequences <= _FEW)
    return [point for point in few if point.cached * slope <= _MOST_CACHE * point.seconds]


def _computing(prompts: Iterable[StepPoint], decoded: Iterable[StepPoint]) -> list[StepPoint]:
    """Return the prompts whose time shows how fast the card computes, not how fast it reads."""
    alone = min((point.seconds for point in decoded if point.sequences == 1), default=inf)
    return [point for point in prompts if point.seconds >= _COMPUTES * alone]


def refuse_impossible(found: Iterable[MeasuredRate], gpus: Sequence[Gpu]) -> None:
    """Refuse rates that are more than the peak of a card.

    Raises:
        UsageError: the first such rate.
    """
    for rate in found:
        for gpu in gpus:
            if rate.exceeds(gpu):
                raise UsageError(
                    f"the timed steps cannot be right for the {gpu.name}: they say that"
                    f" {_WORK[rate.of].format(three_digits(rate.value / 1e9))}, more than its peak",
                    hint="turbofit calibrate MODEL, while nothing else uses the card",
                )


def _cache(decoded: Sequence[StepPoint], slope: float, token_bytes: float) -> list[Ends]:
    """Return the rate at which steps read keys and values.

    Equal numbers of sequences are compared: more cached tokens should take more time along a
    straight line. The spread counts how far steps are off this line, and their own spreads.
    """
    pairs = [(a, b) for a, b in combinations(decoded, 2) if a.sequences == b.sequences]
    seconds = sum((b.seconds - a.seconds) ** 2 for a, b in pairs)
    if not slope or not seconds:
        return []
    off = sum((b.seconds - a.seconds - (b.cached - a.cached) * slope) ** 2 for a, b in pairs)
    off += sum((point.seconds * point.spread) ** 2 for pair in pairs for point in pair)
    rate, spread = token_bytes / slope, sqrt(off / seconds)
    return [(rate * (1 - spread), rate, rate * (1 + spread))]


def _vision(
    group: GroupRates,
    steps: MeasuredSteps,
    prompts: Sequence[StepPoint],
    images: Sequence[StepPoint],
) -> list[Ends]:
    """Return the rates of the vision tower's matrix products, one for each timed image.

    A timed image is a prompt with an image. The time of the prompt without the image is subtracted;
    it follows from other prompts, so their spread counts, too.
    """
    timed, found = group.measured(steps, ""), []
    others = max((point.spread for point in prompts), default=1.0)
    for point in images:
        seconds = timed.tower_seconds(point.units)
        rate = group.card.vision_flops * group.tower_seconds(point.units) / seconds
        off = (point.spread + others) * point.seconds / seconds
        found.append((rate / (1 + off), rate, rate * (1 + off)))
    return found


def _rate(of: RateName, readings: Iterable[Ends]) -> MeasuredRate | None:
    """Return the median of the readings with a small spread; None if there are none.

    The median's own spread, over all these readings, must be small, too.
    """
    kept = [reading for reading in readings if _open(reading, reading[1]) <= _MOST_SPREAD]
    if not kept:
        return None
    lows, values, highs = zip(*kept, strict=True)
    value = median(values)
    spread = _open((min(lows), value, max(highs)), value)
    if spread > _MOST_SPREAD:
        return None
    return MeasuredRate(of=of, value=value, spread=round(spread, 4))


def _open(ends: Ends, value: float) -> float:
    """Return the share by which a rate may differ from ``value``; infinite for an infinite rate."""
    low, _, high = ends
    return max(high / value - 1, 1 - low / value) if high < inf else inf
