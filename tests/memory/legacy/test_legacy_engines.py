"""Older engines as planning asks them, and their generations, read from data."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from tests.memory.conftest import launch_on
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.model import Quantization
from turbofit.core.units import MIB
from turbofit.kernels.census import released
from turbofit.memory.engines import engine_for, engine_named
from turbofit.memory.legacy.generations import (
    generation_of,
    generations,
    torch_generations,
    unread,
)
from turbofit.memory.legacy.pytorch import LegacyPytorch
from turbofit.memory.legacy.turbomind import LegacyTurbomind
from turbofit.memory.versions import is_legacy
from turbofit.model.source import resolve_model


def test_a_version_chooses_the_account():
    assert isinstance(engine_named("turbomind", "0.6.3"), LegacyTurbomind)
    assert isinstance(engine_named("pytorch", "0.7"), LegacyPytorch)
    assert engine_named("turbomind", "0.18.0").version == "0.18"
    with pytest.raises(PackageError):
        engine_named("turbomind", "the newest")


def test_older_turbominds_ran_any_tower_under_torch_and_the_oldest_none():
    model = resolve_model("llava-1.5-7b")
    assert isinstance(engine_for(model, version="0.6.0"), LegacyTurbomind)
    assert engine_for(model).name == "pytorch"
    with pytest.raises(UsageError):
        engine_for(model, version="0.2.5")
    assert isinstance(engine_for(resolve_model("llama-2-7b"), version="0.2.5"), LegacyTurbomind)


def test_predict_with_the_defaults_of_the_version():
    made = turbofit.predict("internvl2-8b", on="a100-80g", lmdeploy="0.5.3")
    assert made.engine.version == "0.5.3"
    assert (made.settings.max_batch_size, made.settings.cache_max_entry_count) == (128, 0.8)
    assert (
        turbofit.predict("internvl2-8b", on="a100-80g", lmdeploy="0.6").settings.max_batch_size
        == 256
    )
    old = turbofit.predict("llama-2-7b", on="a100-80g", lmdeploy="0.2.0")
    assert (old.settings.cache_block_seq_len, old.settings.cache_max_entry_count) == (128, 0.5)


def test_predict_from_a_log_s_free_memory_says_what_the_user_saw():
    made = turbofit.predict(
        "internvl2-8b",
        on="4xrtx3090",
        tp=4,
        max_dynamic_patch=6,
        lmdeploy="0.6.4",
        free_at_cache=2780 * MIB,
    )
    assert made.kv.region_bytes == 1112 * 2 * MIB
    assert not made.fits


def test_the_kernels_of_a_version_are_its_release_s_whatever_is_installed(monkeypatch):
    monkeypatch.setattr("turbofit.kernels.installed.installed", lambda: released((0, 18, 0)))
    launch = launch_on("1xrtx5090", "internvl2-8b", session_len=4096)
    here = replace(launch, machine=replace(launch.machine, source="nvml"))
    assert engine_named("turbomind").missing_kernels(here) is None
    said = str(LegacyTurbomind("0.6.3").missing_kernels(here))
    assert "LMDeploy 0.6.3 has no code at all" in said
    assert said == LegacyTurbomind("0.6.3").missing_kernels(launch)


@pytest.mark.parametrize(
    ("version", "count", "option", "said"),
    [
        ("0.0.14", 48, {}, None),
        ("0.0.14", 48, {"quant_policy": 42}, "--quant-policy 42"),
        ("0.3.0", 0.5, {"quant_policy": 8}, "cache in 8 bits is 4"),
        ("0.3.0", 0.5, {"quant_policy": 4}, None),
        ("0.4.0", 0.5, {"quant_policy": 8}, None),
        ("0.5.3", 700, {"model_format": "awq"}, "--model-format awq"),
        ("0.15.0", 700, {}, "takes no block count"),
    ],
)
def test_a_count_of_blocks_was_taken_and_other_options_are_checked_beside_it(
    version, count, option, said
):
    options = {"dtype": "float16", "session_len": 4096, "cache_max_entry_count": count, **option}
    launch = launch_on("1xa100-80g", "internvl2-8b", **options)
    found = LegacyTurbomind(version).problem(launch)
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize(
    ("name", "tp", "version", "said"),
    [
        ("qwen2.5-1.5b", 4, "0.5.3", "a floating point exception"),  # 2 KV heads
        ("qwen2.5-1.5b", 4, "0.6.0", "an assertion"),
        ("qwen2.5-1.5b", 4, "0.6.4", "an assertion"),
        ("qwen2.5-1.5b", 4, "0.6.5", None),
        ("qwen2.5-1.5b", 4, "0.7.0", None),
        ("qwen2.5-1.5b", 2, "0.5.3", None),
        ("internvl2.5-4b", 8, "0.6.4", "2 of them over 8 ranks"),
        ("qwen2.5-1.5b", 3, "0.5.3", "takes powers of two"),
        ("qwen2.5-1.5b", 3, "0.6.0", "2 of them over 3 ranks"),
        ("qwen2.5-1.5b", 3, "0.13.0", "only over a multiple of them"),
        ("internvl2-8b", 8, "0.5.3", None),
        ("qwen2.5-7b-awq", 8, "0.5.3", "repeats no KV heads"),
    ],
)
def test_heads_and_widths_were_dealt_to_ranks_otherwise(name, tp, version, said):
    found = LegacyTurbomind(version).tp_problem(resolve_model(name), tp)
    assert found is None if said is None else said in str(found)


def test_widths_that_do_not_divide_were_an_assertion_before_0_6():
    model = resolve_model("internvl2-8b")  # 14,336 channels
    odd = replace(model, text=replace(model.text, intermediate=14_338))
    assert "14338 channels" in str(LegacyTurbomind("0.5.3").tp_problem(odd, 4))
    assert LegacyTurbomind("0.6.0").tp_problem(odd, 4) is None


def test_a_tower_under_torch_is_not_divided():
    model = resolve_model("qwen2-vl-7b")
    odd = replace(model, vision=replace(model.vision, hidden=1281, merge=1))
    assert LegacyTurbomind("0.9.2").tp_problem(odd, 2) is None
    assert "merger" in str(LegacyTurbomind("0.16.0").tp_problem(odd, 2))


@pytest.mark.parametrize(("version", "refused"), [("0.6.4", True), ("0.6.5", False)])
def test_the_pytorch_engine_repeats_kv_heads_since_0_6_5_too(version, refused):
    found = LegacyPytorch(version).tp_problem(resolve_model("qwen2.5-1.5b"), 4)
    assert (found is not None) == refused


@pytest.mark.parametrize(
    ("engine", "method", "group", "last_without", "first_with"),
    [
        ("turbomind", "gptq", 128, "0.5.3", "0.6.0"),
        ("turbomind", "fp8", 128, "0.8.0", "0.9.0"),
        ("turbomind", "mxfp4", 32, "0.9.2", "0.10.0"),
        ("turbomind", "compressed-tensors", 128, "0.11.1", "0.12.0"),
        ("turbomind", "compressed-tensors", 32, "0.12.2", "0.12.3"),
        ("pytorch", "awq", 128, "0.5.2", "0.5.3"),
        ("pytorch", "fp8", 128, "0.6.5", "0.7.0"),
    ],
)
def test_weights_are_read_since_the_release_that_brought_it(
    engine, method, group, last_without, first_with
):
    packed = Quantization(method=method, bits=8 if method == "fp8" else 4, group_size=group)
    said = str(unread(engine, last_without, packed))
    assert said.endswith(f"which came with {first_with}")
    assert unread(engine, first_with, packed) is None
    model = replace(resolve_model("llama-2-7b"), quantization=packed)
    with pytest.raises(UsageError, match=f"does not read {method}"):
        engine_for(model, engine, last_without)


def test_pixels_were_pinned_in_0_16():
    old = turbofit.predict("internvl2-8b", on="a100-80g", lmdeploy="0.16.0")
    new = turbofit.predict("internvl2-8b", on="a100-80g")
    tokens = old.settings.max_prefill_token_num + old.settings.max_batch_size
    assert old.host.pinned - new.host.pinned == pytest.approx(2 * tokens * 3 * 448**2 * 2, rel=0.05)


@pytest.mark.parametrize("version", ["0.2.0", "0.5.3", "0.12.0"])
def test_a_plan_s_token_is_as_large_as_the_version_s_cache_makes_it(version):
    """The oldest kept no scales with each token: a quantised one was smaller than it is today."""
    made = turbofit.predict(
        "llama-2-7b", on="1xa100-80g", lmdeploy=version, quant_policy=4, session_len=4096
    )
    assert made.kv.region_bytes == made.kv.tokens * made.kv.bytes_per_token


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("0.0.14", "0.0"), ("0.1", "0.1.0"), ("0.2.1", "0.1.0"), ("0.2.2", "0.2.2"),
        ("0.5.2.post1", "0.5.0"), ("v0.5.3", "0.5.3"), ("0.6", "0.6.0"), ("0.6.3", "0.6.2"),
        ("0.13", "0.12.3"), ("0.14.0", "0.14.0"), ("0.17", "0.16.0"),
    ],
)  # fmt: skip
def test_a_version_belongs_to_the_last_generation_that_began(version, first):
    assert generation_of(version).first == first


@pytest.mark.parametrize("version", ["0.18", "0.18.0", "1.2", "latest", ""])
def test_versions_with_an_account_of_their_own_or_none_are_refused(version):
    assert not is_legacy(version)
    with pytest.raises(PackageError):
        generation_of(version)


def test_every_entry_is_complete_ordered_and_names_its_sources():
    for known in (generations(), torch_generations()):
        firsts = [tuple(int(n) for n in one.first.split(".")) for one in known]
        assert firsts == sorted(firsts)
        assert all(one.source for one in known)


def test_what_an_entry_does_not_say_the_one_before_does():
    old, new = generation_of("0.5.2"), generation_of("0.5.3")
    assert (old.forward, new.forward) == ("session", "prefill")
    assert new.cache == old.cache
    assert new.buffers == old.buffers
    assert new.source != old.source
