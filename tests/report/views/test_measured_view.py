"""A tuning."""

from __future__ import annotations

from msgspec.structs import replace

from tests.measure.test_tune_slo import SEEN
from tests.planning.test_tuned import tuning
from turbofit.core.tuning import Tuning
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
    none = paint(tune_view(replace(several(), best=None)))
    assert "none of 4 settings keeps the SLO" in none
