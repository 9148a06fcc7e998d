from __future__ import annotations

import re

import pytest

from turbofit.launch.tune.space import mean_request, smaller_limit
from turbofit.load.spec import LoadSpec
from turbofit.planning.plan import plan
from turbofit.planning.request import PlanRequest

REQUEST = PlanRequest(model="qwen2-vl-7b", on="1xrtx3090", engine="turbomind")


def offered(load: LoadSpec, request: PlanRequest = REQUEST) -> str:
    return smaller_limit(request, plan(request), load, mean_request(load), 32)


def limit_of(said: str) -> int:
    return int(said.partition(" --max-pixels ")[2].partition(":")[0])


def test_the_smallest_limit_that_changes_no_image_is_offered_with_what_it_gives() -> None:
    small = offered(LoadSpec.of(image_size=((448, 448),)))
    assert small.startswith("the load's images need no more than --max-pixels ")
    after, before = (float(x) for x in re.findall(r"\d+\.\d+", small.partition(":")[2]))
    assert after > 1.05 * before
    rule = plan(REQUEST).model.image_rule
    assert rule is not None
    assert rule.units(448, 448, limit_of(small)) == rule.units(448, 448, rule.checkpoint_limit)
    large = offered(LoadSpec.of(image_size=((448, 448), (1600, 1600))))
    assert limit_of(large) >= 1600 * 1600


@pytest.mark.parametrize(
    ("load", "request_"),
    [
        (LoadSpec.of(image_size=((3584, 3584),)), REQUEST),
        (LoadSpec.of(images=0), REQUEST),
        (LoadSpec.of(image_size=((448, 448),)), REQUEST.changed(max_pixels=4_000_000)),
        (LoadSpec.of(image_size=((448, 448),)), REQUEST.changed(image_size=(1000, 1000))),
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
