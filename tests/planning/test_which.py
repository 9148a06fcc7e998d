"""`turbofit which`: each line is what `turbofit plan` says, and the smallest come first."""

from __future__ import annotations

import random

import pytest

import turbofit
from tests.support.plans import few_presets
from turbofit.core.which import Serving, Which
from turbofit.machine.presets import preset_names
from turbofit.machine.source import machine_from
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.which import COUNTS, blank_line, serving


@pytest.fixture(scope="module")
def cards() -> Which:
    return turbofit.which("internvl2-8b", context=8192, concurrency=4)


@pytest.fixture(scope="module")
def models() -> Which:
    return turbofit.which(on="1xrtx3060")


def same_as_plan(row: Serving, plan: turbofit.Plan) -> None:
    assert plan.fits
    speed = plan.throughput
    assert speed is not None
    assert (row.engine, row.kv_tokens, row.context) == (
        plan.engine.name,
        plan.kv.total_tokens,
        plan.settings.session_len,
    )
    assert (row.tp, row.replicas) == (plan.parallel.tp, plan.parallel.replicas)
    assert (row.image_limit, row.requests_at_once) == (
        plan.limits.image_limit,
        plan.requests_at_once,
    )
    assert row.requests_per_second == speed.requests_per_second
    assert row.output_tokens_per_second == speed.output_tokens_per_second
    assert row.seconds_to_first_token == speed.seconds_to_first_token


def test_cards_are_told_as_plan_tells_them(cards):
    for row in random.Random(1).sample(cards.keep, 8):
        same_as_plan(row, turbofit.plan("internvl2-8b", on=row.on, context=8192, concurrency=4))


def test_fewer_of_a_card_do_not_keep_the_promise(cards):
    several = [row for row in cards.keep if row.gpus > 1]
    for row in random.Random(2).sample(several, 4):
        fewer = COUNTS[COUNTS.index(row.gpus) - 1]
        on = f"{fewer}x{row.on.partition('x')[2]}"
        plan = turbofit.plan("internvl2-8b", on=on, context=8192, concurrency=4)
        assert not plan.fits or plan.limits.image_limit != row.image_limit


def test_every_card_is_there_once_and_the_smallest_first(cards):
    names = [row.on.partition("x")[2] for row in (*cards.keep, *cards.others)]
    assert sorted(names) == sorted(preset_names())
    assert [row.bytes for row in cards.keep] == sorted(row.bytes for row in cards.keep)
    assert all(row.why_not for row in cards.others)


def test_models_are_told_as_plan_tells_them(models):
    assert {row.model for row in (*models.keep, *models.others)} == set(known_presets())
    for row in random.Random(3).sample(models.keep, 6):
        plan = turbofit.plan(row.model, on="1xrtx3060")
        if plan.throughput is not None:
            same_as_plan(row, plan)


@pytest.mark.parametrize("on", ["rtx3060+a100-80g", "a100-80g:free=9GiB+a100-80g"])
def test_a_model_that_one_of_unequal_cards_holds_is_served(on):
    machine = machine_from(on)
    request = WhichRequest(model=preset_model("internvl2-26b"), on=machine)
    blank = blank_line("internvl2-26b", on, machine)
    assert serving(request, resolve(request), blank).requests_at_once
    assert turbofit.plan("internvl2-26b", on=on).fits


def test_what_is_short_is_told_as_plan_tells_it():
    on = "1xrtx3060:used=6GiB,ram=2GiB"
    request = WhichRequest(model=preset_model("internvl2.5-4b"), on=machine_from(on))
    blank = blank_line("internvl2.5-4b", on, machine_from(on))
    said = serving(request, resolve(request), blank).why_not
    assert turbofit.plan("internvl2.5-4b", on=on).verdict.endswith(said)


def test_cards_hold_the_requests_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    few_presets(monkeypatch)
    found = turbofit.which("internvl2-8b", concurrency=200, engine="turbomind")
    assert all(row.requests_at_once >= 200 for row in found.keep)
    few = [row for row in found.others if " of 200 requests of 3,840 tokens" in row.why_not]
    assert few
    for row in (few[0], found.keep[0]):
        assert (
            turbofit.plan("internvl2-8b", on=row.on, concurrency=200, engine="turbomind").fits
            is row.keeps
        )
    models = turbofit.which(on="1xl4", concurrency=200, engine="turbomind")
    assert any(" of 200 requests of " in row.why_not for row in models.others)
