from __future__ import annotations

import json

from turbofit.launch.tune.space import choices, forecast_of, mean_request
from turbofit.load.spec import LoadSpec
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

REQUEST = PlanRequest(model="internvl2-2b", on="1xrtx3090", engine="turbomind")
USUAL = plan(REQUEST)
MEAN = mean_request(LoadSpec.of(image_size=((448, 448),)))


def test_all_keep_the_promise_and_fit_and_the_usual_plan_is_first() -> None:
    found = choices(REQUEST, USUAL, MEAN, 32, (0, 8))
    assert found[0].plan == USUAL
    assert found[0].options == {}
    assert len(found) > 20
    assert {one.plan.settings.quant_policy for one in found} == {0, 8}
    for one in found:
        assert one.plan.fits
        assert one.plan.limits.image_limit == USUAL.limits.image_limit
        assert one.plan.settings.session_len >= USUAL.settings.session_len
        json.dumps(one.options)
    # Rows that the load cannot fill make no other trial.
    assert len({one.option.point for one in found}) == len(found)


def test_what_is_given_is_not_changed() -> None:
    fixed = REQUEST.changed(max_batch_size=8, quant_policy=4)
    found = choices(fixed, plan(fixed), MEAN, 32, (0, 8))
    assert {one.plan.settings.max_batch_size for one in found} == {8}
    assert {one.plan.settings.quant_policy for one in found} == {4}
    assert len({one.plan.settings.max_prefill_token_num for one in found}) > 1


def test_shapes_use_all_cards() -> None:
    request = PlanRequest(model="internvl2-8b", on="2xrtx3090", engine="turbomind")
    found = choices(request, plan(request), MEAN, 16)
    shapes = {(one.plan.parallel.tp, one.plan.parallel.replicas) for one in found}
    assert shapes == {(1, 2), (2, 1)}


def test_a_forecast_follows_the_load(tmp_path) -> None:
    small = forecast_of(USUAL, MEAN, 8)
    long = forecast_of(USUAL, MEAN._replace(output_tokens=1024), 8)
    assert long.requests_per_second < small.requests_per_second / 3
    many = forecast_of(USUAL, MEAN._replace(images=((448, 448),) * 8), 8)
    assert many.requests_per_second < small.requests_per_second
    assert many.ttft > small.ttft
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"at":0,"output_tokens":10,"prompt_tokens":4}\n{"at":1,"output_tokens":30}\n')
    assert mean_request(LoadSpec.of(trace=str(trace))) == (2, 20, ())


def test_images_are_queued_where_the_forecast_gains_by_it() -> None:
    request = PlanRequest(model="qwen2-vl-7b", on="1xrtx3090", engine="turbomind")
    usual = plan(request)
    large = mean_request(LoadSpec.of(image_size=((3000, 3000),)))
    found = choices(request, usual, large, 32)
    queued = [one for one in found if one.options.get("queue_images")]
    assert queued
    for one in queued:
        assert one.plan.limits.units_per_forward <= one.plan.limits.units_per_request
    small = choices(request, usual, MEAN, 32)
    assert not [one for one in small if "queue_images" in one.options]
    given = choices(request.changed(queue_images=False), usual, large, 32)
    assert not [one for one in given if "queue_images" in one.options]
