from __future__ import annotations

import math

from msgspec.structs import replace

from tests.launch.tune.test_slo import SEEN
from turbofit.core.tuning import TrialForecast
from turbofit.launch.tune.search import SearchPoint, TrialSearch

#: Batches of 1, 2, 4, … 128; the forecast says that more is better.
OPTIONS = [
    SearchPoint((n / 2,), TrialForecast(requests_per_second=2.0**n, ttft=0.1 * 2**n, tpot=0.01))
    for n in range(8)
]


def serve(search: TrialSearch, rate, starts: int = 12, ttft=lambda _: 0.1) -> list[int]:
    tried = []
    while len(tried) < starts and (index := search.next()) is not None:
        tried.append(index)
        served = rate(index)
        figures = None
        if served is not None:
            figures = replace(
                SEEN, requests_per_second=served, ttft_p90=ttft(index), e2e_p50=1 / served
            )
        search.tell(index, figures)
    return tried


def test_the_first_option_is_tried_first_and_the_peak_is_found() -> None:
    """It serves most at 32, whatever the forecast says."""
    search = TrialSearch(OPTIONS, {}, latency=False, at_once=128)
    tried = serve(search, lambda n: 30 * math.exp(-((n - 5) ** 2) / 2))
    assert tried[0] == 0
    assert search.best() == 5
    assert len(tried) < len(OPTIONS)


def test_a_forecast_that_is_right_up_to_a_factor_needs_few_starts() -> None:
    search = TrialSearch(OPTIONS, {}, latency=False, at_once=128)
    tried = serve(search, lambda n: 0.3 * 2.0**n)
    assert search.best() == 7
    assert tried[1] == 7
    assert len(tried) == 4


def test_engines_that_die_are_left_and_their_neighbours_come_last() -> None:
    search = TrialSearch(OPTIONS, {}, latency=False, at_once=128)
    tried = serve(search, lambda n: None if n >= 5 else 2.0**n)
    assert search.best() == 4
    assert sorted(tried) == sorted(set(tried))
    assert TrialSearch(OPTIONS, {}, latency=False, at_once=1).best() is None


def test_the_best_keeps_the_slo() -> None:
    search = TrialSearch(OPTIONS, {"ttft": 1.0}, latency=False, at_once=128)
    tried = serve(search, lambda n: 2.0**n, ttft=lambda n: 0.15 * 2**n)
    assert search.best() == 2
    assert tried.count(2) == 1
    none = TrialSearch(OPTIONS, {"ttft": 1e-6}, latency=False, at_once=128)
    serve(none, lambda n: 2.0**n)
    assert none.best() is None


def test_latency_wants_the_soonest_answer() -> None:
    search = TrialSearch(OPTIONS, {}, latency=True, at_once=1)
    serve(search, lambda n: 10 - abs(n - 3))
    assert search.best() == 3
