"""Transformers as planning asks it: an engine like the others, one request at a time."""

from __future__ import annotations

import pytest

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.plan import Settings, Workload
from turbofit.machine.source import machine_from
from turbofit.memory.engines import check_options, engine_for, engine_named
from turbofit.memory.transformers.components import components
from turbofit.model.presets import preset_model
from turbofit.tuner.choose import best_plan
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of, vision_load_of

MODEL = preset_model("qwen2-vl-7b")


def test_it_is_found_as_the_others_are():
    assert engine_for(MODEL).name == "turbomind"
    assert engine_for(MODEL, "transformers").name == "transformers"
    only = preset_model("llama-3.2-11b-vision")
    assert engine_for(only).name == "transformers"
    with pytest.raises(UsageError, match="only the checkpoint's own code"):
        engine_for(preset_model("internvl2-8b"), "transformers")
    for version in ("0.18", "0.6.3"):
        with pytest.raises(PackageError, match="transformers engine of LMDeploy"):
            engine_named("transformers", version)


def test_options_of_the_others_are_refused():
    engine = engine_named("transformers")
    check_options(engine, {"dtype": "float16", "session_len": 4096, "max_batch_size": 1})
    for name in ("communicator", "eager_mode", "quant_policy"):
        with pytest.raises(UsageError, match="the fallback engine has no such option"):
            check_options(engine, {name: 1})
    assert engine.tp_problem(MODEL, 1) is None
    assert "by layers" in engine.tp_problem(MODEL, 2)


@pytest.mark.parametrize("on", ["1xrtx3090", "2xrtx3060", "1xrtx3060"])
def test_its_account_of_a_launch_is_the_plan_s(on):
    request = ResolvedRequest(model=MODEL, machine=machine_from(on), workload=Workload(images=2))
    plan = best_plan(request, "transformers")
    assert plan.fits
    engine, vision_load = (
        engine_for(MODEL, "transformers"),
        vision_load_of(request, plan.limits.image_limit),
    )
    gpus = [request.machine.gpu(index) for index in plan.parallel.groups[0]]
    launch = launch_of(request, plan.settings, gpus, vision_load)
    account = engine.account(launch)
    seen = account.at(plan.settings.cache_max_entry_count)
    assert seen.ledgers == plan.gpus
    assert (seen.tokens, seen.region) == (plan.kv.tokens, plan.kv.region_bytes)
    assert account.missing_at(0.5) == 0
    assert account.block_bytes == engine.block_bytes(MODEL, plan.settings)
    assert engine.units_bound(MODEL.image_rule, vision_load, plan.settings) == (
        plan.limits.units_per_forward
    )
    assert engine.problem(launch) is None


def test_what_a_token_reads():
    engine, parts = engine_named("transformers"), components(MODEL, MODEL.dtype)
    traffic = engine.traffic(MODEL, 1)
    assert traffic.vision == parts.vision
    assert traffic.decode == parts.weights - parts.vision - parts.embeddings
    tied = preset_model("qwen2-vl-2b")
    read = components(tied, tied.dtype)
    # A tied embedding is read as the head.
    assert engine.traffic(tied, 1).decode == read.weights - read.vision
    assert engine.host_memory(MODEL, Settings(), units_per_forward=0).pageable == 4 << 30
