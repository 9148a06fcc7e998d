"""Sharing requests among unequal engines, against every way to cut them."""

from __future__ import annotations

from itertools import product
from math import ceil

import pytest

from turbofit.tuner.search.candidates import evenly, held_shares, share_out
from turbofit.tuner.speed import Speed


def engine(prefill: float, step: float, holds: float):
    """An engine that runs so many at once; seconds of a prompt, and of all steps of an answer."""

    def speed(there: float) -> Speed:
        together = min(there, holds)
        batch = max(1.0, together)
        rate = min(1.0, together) * batch / (batch * prefill + step)
        return Speed(
            requests_per_second=rate, seconds_per_request=there / rate, seconds_to_first_token=0,
            running=together, prefill=prefill, step=step, reduce=0,
        )  # fmt: skip

    return speed


FAST, SLOW, SMALL = engine(0.1, 4, 40), engine(0.3, 9, 40), engine(0.1, 4, 2)


@pytest.mark.parametrize("pair", [(FAST, SLOW), (FAST, SMALL), (SLOW, SMALL), (FAST, FAST)])
@pytest.mark.parametrize("requests", [1, 2, 8, 32])
def test_no_other_cut_gives_more_requests_a_second(pair, requests: int) -> None:
    shares = share_out([(1, pair[0]), (1, pair[1])], requests, "throughput")
    assert sum(shares) == pytest.approx(requests)
    assert min(shares) > 0
    value = sum(speed(n).requests_per_second for speed, n in zip(pair, shares, strict=True))
    cut = requests / 32
    for mine in range(1, 32):
        other = pair[0](mine * cut), pair[1](requests - mine * cut)
        assert value >= sum(one.requests_per_second for one in other) - 1e-9


@pytest.mark.parametrize("requests", [2, 8, 32])
def test_for_latency_the_longest_answer_is_the_shortest_possible(requests: int) -> None:
    shares = share_out([(1, FAST), (1, SLOW)], requests, "latency")
    cut, worst = requests / 32, max(FAST(shares[0]).seconds_per_request, 0)
    worst = max(worst, SLOW(shares[1]).seconds_per_request)
    ways = [(FAST(m * cut), SLOW(requests - m * cut)) for m in range(1, 32)]
    assert worst <= min(max(one.seconds_per_request for one in way) for way in ways) + 1e-9


def test_like_engines_get_the_same_and_the_faster_ones_more() -> None:
    for goal, requests in product(("throughput", "latency", "context"), (8, 64)):
        fast, slow = share_out([(3, FAST), (1, SLOW)], requests, goal)
        assert 3 * fast + slow == pytest.approx(requests)
        assert fast > slow


def test_what_no_engine_runs_waits_where_it_is_answered_soonest() -> None:
    shares = share_out([(1, SMALL), (1, engine(0.1, 8, 2))], 64, "throughput")
    waits = [SMALL(shares[0]), engine(0.1, 8, 2)(shares[1])]
    assert waits[0].seconds_per_request == pytest.approx(waits[1].seconds_per_request, rel=0.1)


@pytest.mark.parametrize("goal", ["throughput", "latency", "context"])
@pytest.mark.parametrize(
    ("most", "requests"), [((7, 3), 10), ((7, 3), 9), ((1, 40), 30), ((40, 2), 41), ((9, 1), 4)]
)
def test_no_engine_gets_more_than_it_holds_and_the_others_get_the_rest(
    goal, most: tuple[int, int], requests: int
) -> None:
    """To the last request, where all caches together hold just as many."""
    for shares in (
        share_out([(1, FAST), (1, SLOW)], requests, goal, most),
        evenly([(1, 1.0), (1, 3.0)], requests, most),
    ):
        assert sum(shares) == pytest.approx(requests)
        assert all(0 < share <= one for share, one in zip(shares, most, strict=True))


def test_what_is_held_is_found_out_share_by_share() -> None:
    holds = (5, 2, 30)

    def held(number: int, share: float) -> float:
        return min(ceil(share), holds[number])

    sets = [(2, 1.0), (1, 1.0), (1, 1.0)]
    shares = held_shares(lambda most: evenly(sets, 40, most), held, len(sets))
    assert shares == [5, 2, 28]
    few = held_shares(lambda most: evenly(sets, 100, most), held, len(sets))
    assert few == [5, 2, 30]  # together fewer than 100
    assert held_shares(lambda most: evenly(sets, 4, most), held, len(sets)) == [1, 1, 1]
