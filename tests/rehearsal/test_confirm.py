"""Rehearsals of engines on unequal cards: each is seen, and each ratio is corrected by its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

import turbofit
from tests.support.plans import changed
from turbofit.core.engine_end import AnyEnd, RehearsedCache
from turbofit.core.plan import Plan, Rehearsal, alike
from turbofit.core.units import GIB, MIB
from turbofit.rehearsal import confirm

ON = "rtx3090+rtx4080"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("internvl2-8b-awq", on=ON)


def ended(outcome: Any, missing: int = 0) -> Rehearsal:
    death = AnyEnd(phase="serving", where="a call", asked=missing, left=0) if missing else None
    kept = RehearsedCache(
        free=(10 * GIB,), region=(None,), object_size=None, slab_size=None, tokens=None
    )
    return Rehearsal(
        outcome=outcome, seconds=1.0, engine_version="0.18.0", cases=(), cache=kept, death=death
    )


def seen_with(plan: Plan, *ends: Rehearsal) -> Plan:
    pairs = zip(plan.engines, ends, strict=True)
    return replace(plan, engines=tuple(replace(engine, rehearsal=end) for engine, end in pairs))


def test_only_the_card_that_ran_out_is_corrected_and_those_like_it(plan: Plan) -> None:
    short = ended("out_of_memory", 100 * MIB)
    ratio = plan.engines[1].settings.cache_max_entry_count
    seen = seen_with(plan, ended("served"), short)
    assert confirm.corrected_ratios(seen) == {1: pytest.approx(ratio - 0.01)}
    assert confirm.corrected_ratios(seen_with(plan, ended("served"), ended("served"))) == {}
    mixed = turbofit.plan("internvl2-2b", on="2xrtx3090+1xl4:free=12GiB")
    assert alike(mixed.engines) == ((0, 1), (2,))
    seen = seen_with(mixed, short, short, ended("served"))
    assert set(confirm.corrected_ratios(seen)) == {0, 1}
    equal = turbofit.plan("internvl2-8b", on="4xrtx3090")
    assert set(confirm.corrected_ratios(changed(equal, rehearsal=short))) == {0, 1, 2, 3}


Rehearsed = Callable[[Plan], Plan]


@pytest.fixture
def confirmed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """The plan that is confirmed by rehearsals that end so."""

    def made(rehearse: Rehearsed, **options: object) -> Plan:
        monkeypatch.setattr(confirm, "rehearse_plan", rehearse)
        return turbofit.plan("internvl2-8b-awq", **{"on": ON, "rehearse": True, **options})

    return made


def test_the_plan_is_made_again_with_the_one_ratio_lowered(confirmed, plan: Plan) -> None:
    rehearsed: list[Plan] = []

    def rehearse(made: Plan) -> Plan:
        rehearsed.append(made)
        first = ended("out_of_memory", 100 * MIB) if len(rehearsed) == 1 else ended("served")
        return seen_with(made, first, ended("served"))

    made = confirmed(rehearse)
    before, after = ([group_plan.settings for group_plan in one.engines] for one in rehearsed)
    assert after[0].cache_max_entry_count == pytest.approx(before[0].cache_max_entry_count - 0.01)
    assert after[1] == before[1] == made.engines[1].settings
    assert made.engines[0].settings == after[0]
    assert (made.groups, made.backend) == (plan.groups, plan.backend)


def short_of_margin(made: Plan, missing: int) -> Plan:
    """As rehearsed, served, with so much less left on the first card than its margin."""
    gpu = made.ledgers[0]
    room = gpu.total - gpu.reserved - gpu.margin
    grown = gpu.terms[0].bytes + room - gpu.peak + missing
    ledger = (replace(gpu.terms[0], rehearsed=grown), *gpu.terms[1:])
    seen = seen_with(made, ended("served"), ended("served"))
    return changed(seen, ledgers=(replace(gpu, terms=ledger), *made.ledgers[1:]))


def test_no_plan_is_given_that_misses_its_margin(confirmed, plan: Plan) -> None:
    rehearsed: list[Plan] = []

    def rehearse(made: Plan) -> Plan:
        rehearsed.append(made)
        return short_of_margin(made, 100 * MIB)

    made = confirmed(rehearse)
    ratios = [one.engines[0].settings.cache_max_entry_count for one in (*rehearsed, made)]
    assert len(rehearsed) == 3
    assert ratios == sorted(set(ratios), reverse=True)
    assert confirm.corrected_ratios(made) == {}
    assert made.fits
    assert made.rehearsal is None  # of this ratio nothing was seen, and so the margin is whole
    assert {gpu.margin for gpu in made.ledgers} == {gpu.margin for gpu in plan.ledgers}
    assert any(warning.startswith("not rehearsed: each of 3") for warning in made.warnings)


def test_a_plan_that_still_dies_at_the_last_rehearsal_does_not_fit(confirmed, plan: Plan) -> None:
    died = ended("out_of_memory", 100 * MIB)
    made = confirmed(lambda made: replace(seen_with(made, died, ended("served")), fits=False))
    assert not made.fits
    assert made.rehearsal == died


def test_what_a_rehearsal_settles_is_not_charged_as_unsure(confirmed) -> None:
    def rehearse(made: Plan) -> Plan:
        return changed(made, rehearsal=ended("served"))

    large = turbofit.plan("internvl2-8b-awq", on="2xa100-80g")
    made = confirmed(rehearse, on="2xa100-80g")
    assert made.fits
    assert {gpu.margin for gpu in large.ledgers} == {819 * MIB + 209_715}
    assert {gpu.margin for gpu in made.ledgers} == {307 * MIB + 209_715}
    assert made.kv_tokens > large.kv_tokens
    same = confirmed(rehearse, on="2xa100-80g", margin=large.ledgers[0].margin)
    assert same.engines[0].kv == large.engines[0].kv


def test_no_rehearsal_settles_contexts_and_libraries(confirmed, plan: Plan) -> None:
    """They are estimates on these cards, and three of seven real plans took up to 206 MiB more."""
    made = confirmed(lambda made: seen_with(made, ended("served"), ended("served")))
    assert (
        {gpu.margin for gpu in made.ledgers} == {gpu.margin for gpu in plan.ledgers} == {256 * MIB}
    )
    assert made.engines[0].kv == plan.engines[0].kv
    (why,) = [reason for reason in made.reasons if reason.startswith("margin")]
    assert why.startswith("margin 256 MiB: a rehearsal settled what LMDeploy allocates; contexts")


def test_a_rehearsal_that_could_not_be_held_settles_nothing(confirmed, plan: Plan) -> None:
    made = confirmed(lambda made: seen_with(made, ended("failed"), ended("served")))
    assert made.engines[0].kv == plan.engines[0].kv
    assert [engine.settings for engine in made.engines] == [
        engine.settings for engine in plan.engines
    ]
    assert made.rehearsal == ended("failed")
    assert not made.fits


@pytest.mark.parametrize(
    ("ends", "corrected"),
    [
        ((ended("served"), ended("hang")), set()),
        # A lack of memory counts before a rehearsal that could not be held.
        ((ended("failed"), ended("out_of_memory", 100 * MIB)), {1}),
    ],
    ids=["hang", "out of memory"],
)
def test_the_worst_end_is_the_plans(
    monkeypatch, plan: Plan, ends: tuple[Rehearsal, ...], corrected: set[int]
) -> None:
    monkeypatch.setattr(
        confirm,
        "rehearsed_engine",
        lambda made, i, _: replace(made.engines[i], rehearsal=ends[i]),
    )
    seen = confirm.rehearse_plan(plan)
    assert not seen.fits
    assert seen.rehearsal == ends[1]
    assert tuple(group_plan.rehearsal for group_plan in seen.engines) == ends
    assert [gpu.index for gpu in seen.ledgers] == [0, 1]
    assert set(confirm.corrected_ratios(seen)) == corrected


def test_a_signal_lets_a_rehearsal_clear_away(monkeypatch, plan: Plan) -> None:
    monkeypatch.setattr(
        confirm, "rehearsed_engine", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            confirm.rehearse_plan(plan)
    finally:
        signal.signal(signal.SIGTERM, before)
