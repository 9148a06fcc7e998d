from __future__ import annotations

import json
import re

import pytest

from turbofit.launch.tune.space import choices, forecast_of, mean_request, smaller_limit
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


QWEN = PlanRequest(model="qwen2-vl-7b", on="1xrtx3090", engine="turbomind")


def offered(load: LoadSpec, request: PlanRequest = QWEN) -> str:
    return smaller_limit(request, plan(request), load, mean_request(load), 32)


def limit_of(said: str) -> int:
    return int(said.partition(" --max-pixels ")[2].partition(":")[0])


def test_the_smallest_limit_that_changes_no_image_is_offered_with_what_it_gives() -> None:
    small = offered(LoadSpec.of(image_size=((448, 448),)))
    assert small.startswith("the load's images need no more than --max-pixels ")
    after, before = (float(x) for x in re.findall(r"\d+\.\d+", small.partition(":")[2]))
    assert after > 1.05 * before
    rule = plan(QWEN).model.image_rule
    assert rule is not None
    assert rule.units(448, 448, limit_of(small)) == rule.units(448, 448, rule.checkpoint_limit)
    large = offered(LoadSpec.of(image_size=((448, 448), (1600, 1600))))
    assert limit_of(large) >= 1600 * 1600


@pytest.mark.parametrize(
    ("load", "request_"),
    [
        (LoadSpec.of(image_size=((3584, 3584),)), QWEN),
        (LoadSpec.of(images=0), QWEN),
        (LoadSpec.of(image_size=((448, 448),)), QWEN.changed(max_pixels=4_000_000)),
        (LoadSpec.of(image_size=((448, 448),)), QWEN.changed(image_size=(1000, 1000))),
    ],
)
def test_nothing_is_offered_where_images_need_the_limit_or_the_person_gave_it(
    load: LoadSpec, request_: PlanRequest
) -> None:
    assert offered(load, request_) == ""


def test_of_a_trace_every_image_counts(tmp_path) -> None:
    trace = tmp_path / "t.jsonl"
    line = '{"at":%d,"output_tokens":10,"prompt_tokens":4,"images":[[%d,%d]]}\n'
    trace.write_text(line % (0, 448, 448))
    assert offered(LoadSpec.of(trace=str(trace)))
    trace.write_text(line % (0, 448, 448) + line % (1, 3584, 3584))
    assert not offered(LoadSpec.of(trace=str(trace)))
