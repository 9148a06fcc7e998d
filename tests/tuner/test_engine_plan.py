from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.memory.engines import engine_named
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve
from turbofit.tuner.choose import make_plan

THREAD = "github.com/InternLM/lmdeploy/issues/2822"


def test_what_is_known_to_go_wrong_is_a_warning_that_names_the_thread():
    plan = turbofit.plan("qwen2.5-7b", on="2xrtx3090", quant_policy=4)
    assert plan.fits
    assert [text for text in plan.warnings if THREAD in text] == [
        text for text in plan.warnings if "4 bits" in text
    ]
    assert sum(THREAD in text for text in plan.warnings) == 1
    assert not any(THREAD in text for text in turbofit.plan("qwen2.5-7b", on="l4").warnings)


def test_what_always_dies_is_refused_with_what_to_do():
    request = resolve(PlanRequest(model="qwen2.5-7b", on="1xrtx3090"))
    weights = Quantization(method="fp8", bits=8, group_size=128)
    request = replace(request, model=replace(request.model, quantization=weights))
    with pytest.raises(UsageError) as caught:
        make_plan(request, engine_named("turbomind", "0.16.0"))
    assert "No feasible kernel found" in caught.value.message
    assert "github.com/InternLM/lmdeploy/issues/4863" in caught.value.message
    assert "0.17" in caught.value.hint
    assert make_plan(request, engine_named("turbomind", "0.17.0")).fits
