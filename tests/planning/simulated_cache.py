"""A full cache, simulated token by token.

A closed load of requests on a cache that holds fewer than all of them: the oldest go first, a
request is admitted when what it has so far fits, and the youngest lose their newest tokens to
their elders (``whole``: all of their tokens). How many run on average, and how many tokens a
request computes again, is what `turbofit/planning/speed.py` says in a formula.
"""

from __future__ import annotations

import random
from typing import Final, NamedTuple

from turbofit.planning.speed import crowd_of

#: Prompt and answer in tokens, and the requests of which the cache holds all tokens.
CASES: Final = ((50, 500, 30), (50, 500, 85), (256, 256, 8), (256, 256, 60), (500, 500, 30),
                (500, 500, 300), (2048, 128, 40), (3500, 256, 8), (3500, 256, 30))  # fmt: skip
_LONGEST = 8


class Case(NamedTuple):
    """A load, and the cache that it meets; ``spread`` as in :func:`speed_of`, 0 or 1."""

    prompt: int
    output: int
    fitting: int
    spread: int = 0
    whole: bool = False


class _Request:
    """``cached`` tokens of what it has so far are in the cache."""

    def __init__(self, prompt: int, output: int) -> None:
        self.prompt, self.output = prompt, output
        self.done = self.cached = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.done


def simulated(case: Case, crowd: float, seed: int = 0) -> tuple[float, float]:
    """Requests that run over those that fit, and tokens computed again over a mean answer."""
    rng = random.Random(seed)
    there = max(1, round(case.fitting * crowd))
    room = case.fitting * (case.prompt + case.output)
    requests = [_new(case, rng) for _ in range(there)]
    steps = max(2000, 6 * case.output)
    running = ended = again = counted = 0
    for step in range(steps):
        count = _admitted(requests, room)
        _evict(requests, count, room, whole=case.whole)
        late = step > steps * 0.4
        for one in requests[:count]:
            again += late and one.done and one.tokens - one.cached
            one.done += 1
            one.cached = one.tokens
        stay = [one for one in requests if one.done < one.output]
        gone = len(requests) - len(stay)
        requests = stay + [_new(case, rng) for _ in range(gone)]
        running, ended, counted = running + late * count, ended + late * gone, counted + late
    return running / counted / case.fitting, again / max(1, ended) / case.output


def formula(case: Case, crowd: float, share: float) -> tuple[float, float]:
    """The same two figures by the forecast's formula with this ``recomputed_share``."""
    whole = case.prompt + case.output
    room = whole / (case.prompt + case.output * (1 + case.spread) / 2) - 1
    there = max(1, round(case.fitting * crowd))
    running, again = crowd_of(there, case.fitting, max(0.0, room), case.output, share)
    return running / case.fitting, again


def _new(case: Case, rng: random.Random) -> _Request:
    output = case.output
    if case.spread:
        output = max(1, min(round(rng.expovariate(1 / output)), _LONGEST * output))
    return _Request(case.prompt, output)


def _admitted(requests: list[_Request], room: int) -> int:
    """The oldest whose tokens, and one more for each, fit."""
    for count, one in enumerate(requests):
        room -= one.tokens + 1
        if room < 0:
            return count
    return len(requests)


def _evict(requests: list[_Request], count: int, room: int, *, whole: bool) -> None:
    """What is left beside those that run is for the older of the others."""
    room -= sum(one.tokens + 1 for one in requests[:count])
    for one in requests[count:]:
        one.cached = 0 if whole else min(one.cached, room)
        room -= one.cached
