"""The settings that a tuning may try, and their forecasts."""

from __future__ import annotations

import json

from msgspec.structs import replace

from turbofit.measure.load.spec import LoadSpec
from turbofit.measure.tune_space import (
    choices,
    drafts_to_try,
    forecast_of,
)
from turbofit.memory.account import VisionLoad
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest
from turbofit.planning.throughput import host_rate

REQUEST = PlanRequest(model="internvl2-2b", on="1xrtx3090", engine="turbomind")
USUAL = plan(REQUEST)
LOAD = LoadSpec.of(image_size=(448, 448))


def test_all_keep_the_promise_and_fit_and_the_usual_plan_is_first() -> None:
    found = choices(REQUEST, USUAL, LOAD, 32, (0, 8))
    assert (found[0].plan, found[0].options) == (USUAL, {})
    assert len(found) > 20
    assert {one.plan.engines[0].settings.quant_policy for one in found} == {0, 8}
    for one in found:
        assert one.plan.fits
        assert one.plan.promise.limits.image_limit == USUAL.promise.limits.image_limit
        assert one.plan.engines[0].settings.session_len >= USUAL.engines[0].settings.session_len
        json.dumps(one.options)
    # Rows that the load cannot fill make no other trial.
    assert len({(one.plan.engines[0].settings, one.plan.promise.limits) for one in found}) == len(
        found
    )
    rates = [one.rate for one in found[1:]]
    assert rates == sorted(rates, reverse=True)


def test_what_is_given_is_not_changed_and_shapes_use_all_cards() -> None:
    fixed = REQUEST.changed(max_batch_size=8, quant_policy=4)
    settings = [
        one.plan.engines[0].settings for one in choices(fixed, plan(fixed), LOAD, 32, (0, 8))
    ]
    assert {(one.max_batch_size, one.quant_policy) for one in settings} == {(8, 4)}
    assert len({one.max_prefill_token_num for one in settings}) > 1
    request = PlanRequest(model="internvl2-8b", on="2xrtx3090", engine="turbomind")
    found = choices(request, plan(request), LOAD, 16)
    assert {(one.plan.tp, one.plan.replicas) for one in found} == {(1, 2), (2, 1)}


def test_a_forecast_follows_the_load() -> None:
    small = forecast_of(USUAL, LOAD, 8)
    long = forecast_of(USUAL, LOAD.changed(output_tokens=1024), 8)
    assert long.requests_per_second < small.requests_per_second / 3
    many = forecast_of(USUAL, LOAD.changed(images=8), 8)
    assert many.requests_per_second < small.requests_per_second
    assert many.ttft > small.ttft


def test_a_forecast_knows_the_host_that_prepares_images() -> None:
    machine = replace(USUAL.machine, host=replace(USUAL.machine.host, cpus=1))
    alone = replace(USUAL, machine=machine)
    photos = LOAD.changed(image_size=(8160, 6120))
    known, unknown = (forecast_of(one, photos, 8) for one in (alone, USUAL))
    load = VisionLoad(
        units_per_image=USUAL.promise.limits.units_per_image,
        images_per_request=1,
        tokens_per_request=0,
    )
    rule, engines = USUAL.model.image_rule, USUAL.replicas
    host = host_rate(machine, rule, load, engines, size=(8160, 6120))
    assert host is not None
    assert known.requests_per_second == min(unknown.requests_per_second, host.images_per_second)
    assert known.requests_per_second < unknown.requests_per_second
    assert known.ttft > unknown.ttft + host.seconds
    text = LOAD.changed(images=0)
    assert forecast_of(alone, text, 8) == forecast_of(USUAL, text, 8)


def test_drafts_change_the_tokens_of_a_step_alone() -> None:
    request = PlanRequest(
        model="qwen3.5-9b", on="1xa100-40g", speculative_algorithm="qwen3_5_mtp", images=0
    )
    found = drafts_to_try(request, plan(request), LOAD.changed(images=0), 8, (0, 1, 2, 3))
    drafts = [one.plan.model.draft for one in found]
    assert [draft and draft.tokens for draft in drafts if draft] == [1, 2, 3]
    assert len(found) == 4  # one of them has no draft, and may be on the faster engine
    assert {one.plan.backend.name for one in found} == {"pytorch", "turbomind"}
    json.dumps([one.options for one in found])
