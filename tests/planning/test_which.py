"""`turbofit which`: each line is what `turbofit plan` says, and the smallest come first."""

from __future__ import annotations

import random

import pytest

import turbofit
from tests.support.plans import few_presets
from tests.sweep import sweep
from turbofit.core.units import GIB
from turbofit.machine.presets import preset_names
from turbofit.machine.source import machine_from
from turbofit.model.presets import known_presets, preset_model
from turbofit.planning import which as which_room
from turbofit.planning.request import WhichRequest
from turbofit.planning.resolve import resolve
from turbofit.planning.which import COUNTS, Serving, empty_row, serving

pytestmark = pytest.mark.slow


def test_cards_are_told_as_plan_tells_them_the_smallest_first(monkeypatch: pytest.MonkeyPatch):
    cards = sweep(sorted(preset_names()), every=8)
    few_presets(monkeypatch, cards)
    asked = {"model": "internvl2-8b", "context": 8192, "concurrency": 4}
    found = turbofit.which(**asked)
    rng = random.Random(1)
    for row in rng.sample(found.keep, 4):
        same_as_plan(row, turbofit.plan(on=row.on, **asked))
    for row in rng.sample([row for row in found.keep if row.gpus > 1], 2):
        fewer = COUNTS[COUNTS.index(row.gpus) - 1]
        plan = turbofit.plan(on=f"{fewer}x{row.on.partition('x')[2]}", **asked)
        assert not plan.fits or plan.promise.limits.image_limit != row.image_limit
    assert sorted([row.on.partition("x")[2] for row in (*found.keep, *found.others)]) == cards
    sizes = [round(row.bytes / GIB, 1) for row in found.keep]
    assert sizes == sorted(sizes)
    assert all(row.why_not for row in found.others)


def test_models_are_told_as_plan_tells_them(monkeypatch: pytest.MonkeyPatch):
    names = sweep(sorted(known_presets()))
    few_presets(monkeypatch, models=names)
    models = turbofit.which(on="1xrtx3060")
    assert {row.model for row in (*models.keep, *models.others)} == set(names)
    for row in random.Random(3).sample(models.keep, 4):
        same_as_plan(row, turbofit.plan(row.model, on="1xrtx3060"))
    # Those with images come first, but for those that Transformers alone runs.
    for asked, without in ((models, False), (turbofit.which(on="1xrtx3060", images=0), True)):
        rows = [preset_model(row.model) for row in asked.keep if row.of_lmdeploy]
        order = [(model.vision is not None and not without, model.weight_bytes) for model in rows]
        assert order == sorted(order, reverse=True)


def test_of_one_size_the_faster_card_comes_first_and_unknown_speeds_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_presets(monkeypatch, ["l4", "a10", "a10g", "rtx3090", "rtx4090", "rtx2080ti-22g"])
    found = [row.on for row in turbofit.which("internvl2-8b").keep]
    assert found == [
        "1xrtx2080ti-22g", "1xa10", "1xa10g", "1xl4", "1xrtx4090", "1xrtx3090",
    ]  # fmt: skip
    rows = [
        Serving(model="m", on=on, gpus=1, bytes=GIB, keeps=True, requests_per_second=speed)
        for on, speed in (("a", None), ("b", 1.0), ("c", 2.0))
    ]
    assert [row.on for row in sorted(rows, key=which_room.by_size)] == ["c", "b", "a"]


def same_as_plan(row: Serving, plan: turbofit.Plan) -> None:
    assert plan.fits
    assert (row.engine, row.image_limit) == (plan.backend.name, plan.promise.limits.image_limit)
    assert (row.kv_tokens, row.context) == (plan.kv_tokens, plan.engines[0].settings.session_len)
    assert (row.tp, row.replicas) == (plan.tp, plan.replicas)
    assert row.requests_at_once == plan.promise.requests
    assert set(row.warnings) <= set(plan.warnings)
    if plan.throughput:
        for figure in ("requests_per_second", "output_tokens_per_second"):
            assert getattr(row, figure) == getattr(plan.throughput, figure)
        usual = plan.usual_image or plan.throughput
        assert row.seconds_to_first_token == usual.seconds_to_first_token_alone
    few = row.requests_at_once < 8 and row.image_limit is not None
    assert few or row.smaller is None
    if row.smaller is not None:
        assert row.smaller.requests_at_once > row.requests_at_once
        assert row.smaller.limit < row.image_limit


def line(model: str, on: str) -> Serving:
    machine = machine_from(on)
    request = WhichRequest(model=preset_model(model), on=machine)
    return serving(request, resolve(request), empty_row(model, on, machine))


@pytest.mark.parametrize("on", ["rtx3060+a100-80g", "a100-80g:free=9GiB+a100-80g"])
def test_a_model_that_one_of_unequal_cards_holds_is_served(on):
    assert line("internvl2-26b", on).requests_at_once
    assert turbofit.plan("internvl2-26b", on=on).fits
    # What is short is told as plan tells it.
    poor = "1xrtx3060:used=6GiB,ram=2GiB"
    said = line("internvl2.5-4b", poor).why_not
    assert turbofit.plan("internvl2.5-4b", on=poor).verdict.endswith(said)


def test_cards_hold_the_requests_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    few_presets(monkeypatch, ["rtx4060", "a100-40g"], ["internvl2-8b"])
    asked = {"concurrency": 200, "engine": "turbomind"}
    found = turbofit.which("internvl2-8b", **asked)
    assert all(row.requests_at_once >= 200 for row in found.keep)
    few = [row for row in found.others if " of 200 requests of 3,840 tokens" in row.why_not]
    for row in (few[0], found.keep[0]):
        assert turbofit.plan("internvl2-8b", on=row.on, **asked).fits is row.keeps
    models = turbofit.which(on="1xl4", **asked)
    assert any(" of 200 requests of " in row.why_not for row in models.others)


def test_a_model_that_needs_4_bit_weights_names_the_command_that_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Published ones are rows of their own; what fits, or never fits, needs none."""
    names = ["internvl3-14b-hf", "internvl3-14b", "internvl3-8b-hf", "qwen2.5-72b"]
    few_presets(monkeypatch, models=names)
    found = turbofit.which(on="1xrtx3090")
    commands = {row.model: row.quantize for row in (*found.keep, *found.others)}
    made = "turbofit quantize internvl3-14b-hf --on 1xrtx3090"
    assert commands == dict.fromkeys(names) | {"internvl3-14b-hf": made}
