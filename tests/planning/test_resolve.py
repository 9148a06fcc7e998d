"""A request as the search takes it: its machine, and what contradicts itself."""

from __future__ import annotations

import pytest

import turbofit
from bench.rehearsal.adapters import write_adapter
from tests.support.plans import few_presets
from turbofit.core.errors import UsageError
from turbofit.machine.source import machine_from
from turbofit.model.source import resolve_model
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolve import resolve

pytestmark = pytest.mark.slow


def test_gpus_of_a_machine_are_kept_to_as_those_of_its_spec():
    for on in (machine_from("1xl4+1xa100"), "1xl4+1xa100"):
        request = PlanRequest(model="internvl2-8b", on=on, gpus="1")
        assert resolve(request).machine.visible == (1,)
        told = turbofit.predict("internvl2-8b", on=on, gpus="1")
        for plan in (turbofit.plan(request), told):
            assert [gpu.index for gpu in plan.ledgers] == [1]
        with pytest.raises(UsageError, match="--gpus: '9' is not one GPU of this machine"):
            resolve(request.changed(gpus="9"))


def test_a_given_batch_counts_on_each_engine(monkeypatch):
    few_presets(monkeypatch)
    asked = {"max_batch_size": 4, "concurrency": 8}
    one = turbofit.plan("internvl2-8b", on="4xa100", replicas=1, **asked)
    assert one.verdict.endswith("max_batch_size 4 runs 4 of 8 at once")
    two = turbofit.plan("internvl2-8b", on="2xa100", **asked)
    assert (two.replicas, two.requests_at_once) == (2, 8)
    found = turbofit.which("internvl2-8b", **asked)
    assert found.keep
    assert all(row.requests_at_once >= 8 and row.replicas >= 2 for row in found.keep)


def test_images_that_are_asked_for_contradict_a_model_or_an_engine_without_them(monkeypatch):
    few_presets(monkeypatch)
    found = turbofit.which(on="1xa100-80g", images=1)
    why_not = {row.model: row.why_not for row in found.others}
    assert why_not["qwen2.5-7b"] == "Qwen2.5-7B-Instruct takes no images"
    assert "internvl2-8b" in {row.model for row in found.keep}
    with pytest.raises(UsageError, match="takes no images"):
        turbofit.which("qwen2.5-7b", images=2)
    for told in (turbofit.plan, turbofit.predict):
        with pytest.raises(UsageError, match=r"Qwen2.5-7B-Instruct takes no images"):
            told("qwen2.5-7b", on="1xa100-80g", images=2)
    text = {"on": "1xa100", "language_model_only": True}
    with pytest.raises(UsageError, match="images=2 asks for images"):
        turbofit.plan("internvl2-8b", images=2, **text)
    for more in ({}, {"images": 0}):
        assert turbofit.plan("internvl2-8b", **text, **more).fits


def test_a_session_that_no_cache_holds_is_told(monkeypatch):
    few_presets(monkeypatch)
    asked = {"on": "1xl4", "cache_max_entry_count": 0.2}
    for plan in (
        turbofit.plan("internvl2-8b", session_len=32768, **asked),
        turbofit.predict("internvl2-8b", context=32768, **{**asked, "on": "1xrtx3090"}),
    ):
        assert plan.fits
        short = f"the cache holds {plan.engines[0].kv.tokens:,} tokens, a session may have 32,768"
        assert any(text.startswith(short) for text in plan.warnings)
    found = turbofit.which("internvl2-2b", session_len=32768, cache_max_entry_count=0.1)
    assert all(row.kv_tokens >= 32768 * row.replicas for row in found.keep)
    assert any("a session may have 32,768" in row.why_not for row in found.others)
    # Neither a session beyond the model's maximum.
    beyond = turbofit.plan("internvl2-8b", on="1xa100-80g", session_len=65536).warnings
    assert any("reads 32,768 tokens, a session may have 65,536" in text for text in beyond)


def test_a_context_of_max_is_the_models_own_and_a_budget_may_be_a_share_of_each_card():
    request = PlanRequest(model="internvl2-8b", on="1xa100-80g", context="max", concurrency=1)
    resolved = resolve(request)
    assert resolved.workload.context == resolved.model.text.max_position_embeddings
    given = resolve(PlanRequest(model="internvl2-8b", on="1xa100-80g", session_len="max"))
    assert given.engine_options["session_len"] == resolved.workload.context
    assert turbofit.plan(request).engines[0].settings.session_len == resolved.workload.context
    half = resolve(PlanRequest(model="internvl2-2b", on="rtx3090+l40s", budget="50%"))
    for gpu in half.machine.gpus:
        assert half.margin_of(gpu) == half.margin.of(gpu) + gpu.usable - gpu.total // 2


def test_adapters_and_overrides_as_lmdeploys_own_config_has_them(tmp_path, monkeypatch):
    """Paths that the engine reads from elsewhere are whole; a second reading changes nothing."""
    write_adapter(resolve_model("qwen2.5-0.5b"), tmp_path / "lora", 8)
    monkeypatch.chdir(tmp_path)
    asked = {"adapters": {"sql": "lora"}, "hf_overrides": {"max_position_embeddings": 65536}}
    request = PlanRequest(model="qwen2.5-0.5b", on="1xrtx3060", context="max", **asked)
    first = resolve(request)
    assert first.engine_options["adapters"] == (f"sql={tmp_path / 'lora'}",)
    assert (first.model.text.max_position_embeddings, first.workload.context) == (65536, 65536)
    assert resolve(request.changed(model=first.model)).model == first.model
    with pytest.raises(UsageError, match="hf-overrides is not JSON"):
        resolve(request.changed(hf_overrides="{"))
    typed = request.changed(model="Qwen2.5 0.5B", adapters={"Qwen2.5 0.5B": "lora"})
    with pytest.raises(UsageError, match=r"Qwen2\.5 0\.5B, like the model"):
        resolve(typed)
