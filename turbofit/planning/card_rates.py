"""What the timed forwards of one model say of its cards, for plans of other models on them.

A forward takes as long as its work at a rate, and as its launches, which no rate shortens. Launches
are not told apart from work: they may be half as long as the constants say, or half as long again,
and what that leaves open counts as the rate's spread. A rate with a larger spread than speeds are
promised with is not determined: small models on fast cards do not show how weights are read.
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
#: The share by which launches may differ from the constants. With the presets' rates of an H200,
#: its steps of Qwen2-VL-2B and InternVL2-8B leave 0.46 and 0.72 of them (bench/gpu).
_LAUNCHES: Final = 0.5
#: Sequences of which a forward reads weights rather than computes, on any card.
_FEW: Final = 8
#: A prompt computes rather than reads if it takes so many times as long as a step of one sequence.
_COMPUTES: Final = 2.0
#: The largest share of the cache in a step that shows how weights are read.
_MOST_CACHE: Final = 0.1

#: The least, the likely and the largest rate that one reading leaves possible.
Ends = tuple[float, float, float]


def rates_of(
    group: GroupRates, steps: MeasuredSteps, launches: Callable[[float], float]
) -> tuple[MeasuredRate, ...]:
    """Return the rates of a group's cards that these forwards determine.

    ``group`` has the constants' rates and the model's work; ``launches`` are the constants' seconds
    of a forward over so many tokens that no rate shortens.
    """
    decoded, prompts, images = by_work(steps)
    slope, work = slope_of(decoded), group.work

    def at_rate(point: StepPoint, amount: float) -> Ends:
        """Return the rates at which a forward does this amount of work beside launches and cache.

        A rate is endless if they may take all of the time.
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
    """Return the steps that read weights for nearly all of their time."""
    few = (point for point in decoded if point.sequences <= _FEW)
    return [point for point in few if point.cached * slope <= _MOST_CACHE * point.seconds]


def _computing(prompts: Iterable[StepPoint], decoded: Iterable[StepPoint]) -> list[StepPoint]:
    """Return the prompts that take much longer than a step that reads all weights."""
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
                    f"timed steps contradict the {gpu.name}: they show a {rate.of} of"
                    f" {three_digits(rate.value / 1e9)} G/s, which is more than its peak",
                    hint="turbofit calibrate MODEL, while nothing else uses the card",
                )


def _cache(decoded: Sequence[StepPoint], slope: float, token_bytes: float) -> list[Ends]:
    """Return the rate at which steps read keys and values.

    What is open is by how much steps differ from a line, and by how much their readings differ.
    """
    pairs = [(a, b) for a, b in combinations(decoded, 2) if a.sequences == b.sequences]
    seconds = sum((b.seconds - a.seconds) ** 2 for a, b in pairs)
    if not slope or not seconds:
        return []
    off = sum((b.seconds - a.seconds - (b.cached - a.cached) * slope) ** 2 for a, b in pairs)
    off += sum((one.seconds * one.spread) ** 2 for pair in pairs for one in pair)
    rate, spread = token_bytes / slope, sqrt(off / seconds)
    return [(rate * (1 - spread), rate, rate * (1 + spread))]


def _vision(
    group: GroupRates,
    steps: MeasuredSteps,
    prompts: Sequence[StepPoint],
    images: Sequence[StepPoint],
) -> list[Ends]:
    """Return the rates of a tower's products in images.

    What the prompt takes of it, other prompts show, so that their spread counts as well.
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
    """Return the median of the readings that leave little open; None if all leave much open."""
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
    """Return the share by which a rate may differ from ``value``; endless rates may by any."""
    low, _, high = ends
    return max(high / value - 1, 1 - low / value) if high < inf else inf
