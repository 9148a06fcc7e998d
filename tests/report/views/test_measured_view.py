"""A tuning."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from tests.measure.test_tune_runner import SEEN
from tests.planning.test_tuned import tuning
from turbofit.core.tuning import Capacity, CapacityLoad, Tuning
from turbofit.report.painters.markdown import paint
from turbofit.report.views.measured_view import tune_view


def several() -> Tuning:
    (best,) = tuning().trials
    slow = replace(SEEN, requests_per_second=0.5, ttft_p90=0.2)
    worse = replace(SEEN, requests_per_second=0.4, ttft_p90=0.6)
    trials = (
        replace(best, number=1, options={}, measured=slow, meets_slo=True),
        replace(best, meets_slo=True),
        replace(best, number=3, measured=worse),
        replace(best, number=4, measured=None, outcome="died", why="<b>out of memory"),
    )
    return tuning(
        trials=trials, slo={"ttft": 0.55}, stopped="the time is up",
    )  # fmt: skip


def test_all_is_said() -> None:
    text = paint(tune_view(several()))
    assert "PRETEND GPUs" not in text
    assert "PRETEND GPUs" in paint(tune_view(replace(several(), pretend=True)))
    for words in (
        "best: turbomind", "+100% against the plan without tuning", "died: ", "misses the SLO",
        "the time is up",
    ):  # fmt: skip
        assert words in text, words
    assert "none of 4 settings keeps the SLO" in paint(tune_view(replace(several(), best=None)))


def test_a_clock_is_said_with_its_word_and_its_percentiles() -> None:
    seen = replace(SEEN, ttft_p99=3.25, tpot_p99=0.0755)
    result = replace(several(), forecast="time by forecast (fair), 4 times slower than life")
    trials = tuple(replace(one, measured=one.measured and seen) for one in result.trials)
    said = paint(tune_view(replace(result, trials=trials, pretend=True)))
    assert "time by forecast (fair), 4 times slower than life" in said
    assert "p99 3.25 s" in said
    assert "p99 75.5 ms" in said
    assert "no speed here is real" not in said
    assert ", forecast" not in said.partition("Every trial")[0]


def capacity(*kept: bool, **given: Any) -> str:
    loads = tuple(
        CapacityLoad(clients=4 * 2**place, rate=None, measured=SEEN, keeps=keeps)
        for place, keeps in enumerate(kept)
    )
    result = replace(
        several(), slo={"ttft": 2.0}, forecast="time by forecast (fair)",
        capacity=Capacity(loads=loads, **given),
    )  # fmt: skip
    return paint(tune_view(result))


def test_how_many_clients_keep_an_slo() -> None:
    said = capacity(True, True, False, clients=8, rate=1.25)
    assert "kept ttft 2 s (90 %): 8 at once, not 16; 1.25 requests a second" in said
    assert "time by forecast (fair)" in said
    assert "kept ttft 2 s (90 %): 8 at once, or more" in capacity(True, clients=8, more=True)
    assert "not even one client keeps ttft 2 s" in capacity(False)
    assert "nothing was measured: this host is too slow" in capacity(why="this host is too slow")
