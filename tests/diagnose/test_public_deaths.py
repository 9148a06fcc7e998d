"""Deaths that people posted: phase and cause of each, no order to end what may be the server."""

from __future__ import annotations

import re

import pytest

from tests.diagnose.public_deaths import RESULTS, Judged, judge, report
from tests.diagnose.public_logs import CASES, log_of
from tests.sweep import sweep
from turbofit.diagnose.explain import diagnose


@pytest.fixture(scope="module")
def judged() -> dict[str, Judged]:
    return {name: judge(name, case) for name, case in CASES.items()}


def test_phase_and_cause_are_the_thread_s(judged: dict[str, Judged]) -> None:
    assert [one for one in judged.values() if one.wrong or one.order] == []


def test_the_page_says_what_is_so_now(judged: dict[str, Judged]) -> None:
    assert RESULTS.read_text() == report(list(judged.values()))


def test_the_collection_is_of_threads_once_each() -> None:
    places = [case["at"] for case in CASES.values()]
    assert len(set(places)) == len(places) >= 60
    assert all(re.fullmatch(r"https://github\.com/\S+/(issues|pull)/\d+", one) for one in places)


@pytest.mark.slow
def test_a_model_and_a_machine_never_make_it_fail() -> None:
    """Whatever a log says of others, a SPEC of four 24 GB cards can be planned for."""
    for name, case in sweep(CASES.items(), 3):
        advice = diagnose([log_of(case).encode()], model="internvl2-8b", on="4xrtx3090").would_work
        assert advice is None or advice.settings or advice.fits is False, name
