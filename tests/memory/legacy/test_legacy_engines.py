"""Older engines as planning asks them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.kernels.released import released
from turbofit.machine.source import machine_from
from turbofit.memory.engines import engine_for, engine_named
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.legacy.legacy_engines import LegacyPytorch, LegacyTurbomind
from turbofit.memory.vision_load import NO_IMAGES
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


def launch_of(on, **settings):
    machine = machine_from(on)
    return EngineLaunch(
        model=resolve_model("internvl2-8b"), settings=Settings(session_len=4096, **settings),
        gpus=machine.gpus, machine=machine, vision_load=NO_IMAGES,
    )  # fmt: skip


def test_the_kernels_of_a_version_are_its_release_s_whatever_is_installed(monkeypatch):
    monkeypatch.setattr("turbofit.kernels.installed.installed", lambda: released((0, 18, 0)))
    launch = launch_of("1xrtx5090")
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
        ("0.5.3", 700, {"model_format": "awq"}, "--model-format awq"),
        ("0.15.0", 700, {}, "takes no block count"),
    ],
)
def test_a_count_of_blocks_was_taken_and_other_options_are_checked_beside_it(
    version, count, option, said
):
    launch = launch_of("1xa100-80g", dtype="float16", cache_max_entry_count=count, **option)
    found = LegacyTurbomind(version).problem(launch)
    assert found is None if said is None else said in str(found)


def test_pixels_were_pinned_in_0_16():
    old = turbofit.predict("internvl2-8b", on="a100-80g", lmdeploy="0.16.0")
    new = turbofit.predict("internvl2-8b", on="a100-80g")
    tokens = old.settings.max_prefill_token_num + old.settings.max_batch_size
    assert old.host.pinned - new.host.pinned == pytest.approx(2 * tokens * 3 * 448**2 * 2, rel=0.05)


@pytest.mark.parametrize("version", ["0.2.0", "0.5.3", "0.12.0"])
def test_a_plan_s_token_is_as_large_as_the_version_s_cache_makes_it(version):
    """The oldest kept no scales with each token: a quantised one was smaller than it is today."""
    made = turbofit.predict(
        "llama-2-7b", on="1xa100-80g", lmdeploy=version, quant_policy=8, session_len=4096
    )
    assert made.kv.region_bytes == made.kv.tokens * made.kv.bytes_per_token
