"""How many clients keep an SLO: at most six loads, each chosen by what those before have shown."""

from __future__ import annotations

import math
from typing import Any

import pytest

from turbofit.core.tuning import Capacity, SpeedFigures
from turbofit.measure.capacity import CapacitySearch, within_host
from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_runner import TrialEnd

LOAD = LoadSpec.of(images=0, seconds=30.0)


def figures(ttft: float, rate: float) -> SpeedFigures:
    times = dict.fromkeys(("tpot_p50", "tpot_p90", "e2e_p50", "e2e_p90", "ttft_p50"), 0.01)
    return SpeedFigures(
        requests_per_second=rate, output_tokens_per_second=100 * rate, ttft_p90=ttft, answered=99,
        failed=0, **times,
    )  # fmt: skip


def searched(
    holds: float, *, first: int, most: int = 512, turns: int = 1, **given: Any
) -> Capacity:
    """A server whose first token takes 2 s with ``holds`` clients, or requests in ten seconds."""
    asked = LOAD.changed(turns=turns)
    search = CapacitySearch(asked, {"ttft": 2.0}, first=first, most=most, **given)
    loads, end = search.loads(), None
    try:
        load = next(loads)
        while True:
            there = load.concurrency or 10 * turns * (load.rate or 0)
            rate = turns * (load.rate or 0) or min(there, holds) / 10
            end = TrialEnd(figures(2.0 * there / holds, rate), "measured")
            load = loads.send(end)
    except StopIteration:
        return search.found()


@pytest.mark.parametrize(("holds", "first"), [(1, 1), (5, 16), (23, 16), (40, 16), (100, 16)])
def test_six_loads_find_nearly_the_most(holds: int, first: int) -> None:
    found = searched(holds, first=first)
    assert len(found.loads) <= 6
    assert holds / 1.6 <= found.clients <= holds
    assert not found.more
    assert found.rate is not None
    assert found.rate <= holds / 10


def test_a_load_at_a_rate_begins_conversations_with_all_their_turns() -> None:
    found = searched(40, first=16, turns=4)
    assert found.rate is not None
    assert found.rate == pytest.approx(40 / 10 / 4, rel=0.2)


def test_where_no_load_breaks_it_there_may_be_more() -> None:
    found = searched(1e6, first=16)
    assert (found.clients, found.more) == (128, True)
    assert searched(1e6, first=16, most=20).clients == 20


def test_where_one_client_is_too_many_there_is_none() -> None:
    found = searched(0.5, first=2)
    assert (found.clients, found.rate, found.more) == (0, None, False)


def test_more_than_the_host_prepares_is_not_kept() -> None:
    said: list[str] = []
    assert searched(100, first=16, host_rate=2.0, say=said.append).clients <= 20
    assert any("the host prepares images for 2/s at most" in text for text in said)
    bounded = within_host(figures(1.0, 4.0), 2.0)
    assert (bounded.requests_per_second, bounded.output_tokens_per_second) == (2.0, 200.0)
    assert within_host(figures(1.0, 4.0), math.inf) == figures(1.0, 4.0)


def test_a_host_that_is_too_slow_ends_it_with_what_was_found() -> None:
    search = CapacitySearch(LOAD, {"ttft": 2.0}, first=4, most=64)
    loads = search.loads()
    assert next(loads).concurrency == 4
    assert loads.send(TrialEnd(figures(1.0, 3.0), "measured")).concurrency == 8
    with pytest.raises(StopIteration):
        loads.send(TrialEnd(None, "unserved", "this host is too slow"))
    found = search.found()
    assert (found.clients, found.why, len(found.loads)) == (4, "this host is too slow", 1)
