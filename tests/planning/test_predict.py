from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.errors import UsageError
from turbofit.core.memory_stack import memory_label
from turbofit.core.units import MIB
from turbofit.machine.source import machine_from


def test_a_prediction_says_what_that_version_is_known_to_die_of():
    old, mended = (
        turbofit.predict("internvl2-8b", on="2xa100", tp=2, communicator="cuda-ipc", lmdeploy=one)
        for one in ("0.15.0", "0.16.0")
    )
    assert (old.fits, mended.fits) == (False, True)
    for words in (
        "does not run: TurboMind before LMDeploy 0.16 ends with",
        "github.com/InternLM/lmdeploy/pull/4873",
        "take --communicator nccl",
    ):
        assert words in old.verdict
    said = [*old.warnings, mended.verdict, *mended.warnings]  # of the old one, once
    assert not any("lmdeploy/pull/" in text for text in said)


def test_what_one_replica_is_known_to_die_of_ends_a_prediction():
    settings = {"engine": "pytorch", "lmdeploy": "0.8.0", "replicas": 2}
    for machine in ("a100+rtx3090", "rtx3090+a100"):
        told = turbofit.predict("internvl3-8b", on=machine, **settings)
        assert not told.fits
        assert "out of resource: shared memory" in told.verdict
    assert turbofit.predict("internvl3-8b", on="2xa100", **settings).fits


def test_the_caches_of_unequal_cards_are_counted_each_by_itself() -> None:
    small, large = (
        turbofit.predict("internvl2-2b", on=on).kv_tokens for on in ("1xrtx3090", "1xa100-80g")
    )
    together = turbofit.predict("internvl2-2b", on="rtx3090+a100-80g", replicas=2)
    assert f"the cache holds {small + large:,} KV tokens" in together.verdict


@pytest.mark.parametrize(
    ("model", "on", "given", "runs"),
    [
        ("qwen3-0.6b", "1xt4", "bfloat16", "float16"),
        ("internvl2-8b-awq", "1xa100", "bfloat16", "float16"),
        ("llava-1.5-7b", "1xa100", "bfloat16", "bfloat16"),  # its checkpoint is in float16
        ("qwen3-0.6b", "a100+t4", None, "float16"),
    ],
)
def test_a_dtype_that_lmdeploy_changes_is_named_and_runs(
    model: str, on: str, given: str | None, runs: str
) -> None:
    told = turbofit.predict(model, on=on, replicas=1 + on.count("+"), dtype=given)
    assert told.engines[0].settings.dtype == runs
    assert "serves" in told.verdict
    said = [text for text in told.warnings if text.startswith("LMDeploy silently runs in float16")]
    assert len(said) == (given == "bfloat16" != runs)


def test_images_that_no_session_has_room_for_are_refused_with_the_arithmetic():
    told = turbofit.predict("internvl2-8b", on="1xrtx3090", images=1_000_000)
    assert not told.fits
    assert told.verdict.endswith(
        "1,000,000 images of the smallest size take 256,000,000 tokens of a session of 32,768"
    )
    short = turbofit.predict("internvl2-8b", on="1xa100", session_len=100)
    assert "one image of the smallest size takes 256 tokens of a session of 100" in short.verdict
    text = turbofit.predict("internvl2-8b", on="1xa100", session_len=100, language_model_only=True)
    assert "tokens of a session" not in text.verdict
    # A warning where they fit once they are smaller.
    settings = {"on": "1xa100", "cache_max_entry_count": 0.5}
    ten, four = (turbofit.predict("internvl2-8b", images=n, **settings) for n in (10, 4))
    assert ten.fits
    refused = "LMDeploy refuses the largest images, whose 64,000 tokens exceed a session of 32,768"
    assert f"serves; {refused}: at most 12 tiles an image; the cache holds" in ten.verdict
    assert "largest images" not in four.verdict
    # The forecast is of images that a session holds, of which no more are there than are held.
    small = turbofit.predict("internvl2-8b", on="1xa100", session_len=1000)
    of_three = turbofit.predict("internvl2-8b", on="1xa100", session_len=1000, max_dynamic_patch=2)
    assert small.throughput.requests_per_second == of_three.throughput.requests_per_second


@pytest.mark.parametrize("settings", [{}, {"engine": "pytorch"}, {"lmdeploy": "0.6.4"}])
def test_more_free_memory_than_a_card_has_is_refused(settings):
    usable = machine_from("1xrtx3090").gpus[0].usable
    turbofit.predict("internvl2-8b", on="1xrtx3090", free_at_cache=usable, **settings)
    with pytest.raises(UsageError) as caught:
        turbofit.predict("internvl2-8b", on="1xrtx3090", free_at_cache=usable + 1, **settings)
    assert "is more than the 23.6 GiB that CUDA can hand out on GPU 0" in caught.value.message
    assert "on=SPEC" in caught.value.hint
    for on in ("l4+rtx3060", "rtx3060+l4"):
        with pytest.raises(UsageError, match="RTX 3060"):  # the smallest card bounds it
            turbofit.predict("internvl2-8b", on=on, replicas=2, free_at_cache="20GiB")
    assert turbofit.predict("internvl2-8b", on="l4+rtx3060", free_at_cache="20GiB").ledgers


def test_what_a_log_had_free_stands_first_with_what_the_ratio_makes_of_it():
    asked = {"on": "4xrtx3090", "tp": 4}
    told = turbofit.predict("internvl2-8b", free_at_cache="2780MiB", **asked)
    free = turbofit.predict("internvl2-8b", **asked)
    assert told.verdict.startswith(
        "InternVL2-8B: of 2,780 MiB free when the cache is sized (19,517 are forecast), the cache"
        " takes 2,224 at the ratio 0.8 and 556 stay free: starts, then aborts on"
    )
    assert "are forecast" not in free.verdict
    slots = turbofit.predict("llama-2-7b", on="1xa100", lmdeploy="0.0.14", free_at_cache="30GiB")
    assert "ratio" not in slots.verdict  # sessions, counted
    assert "the cache takes " in slots.verdict


@pytest.mark.parametrize("version", ["0.5.0", "0.6.4", "0.14.0"])
def test_below_what_free_memory_an_older_lmdeploy_dies_of_images(version):
    asked = {"on": "4xrtx3090", "tp": 4, "lmdeploy": version}
    verdict = turbofit.predict("internvl2-8b", **asked).verdict
    said = re.search(r"with less than ([\d,]+) MiB free when the cache is sized it (.+)$", verdict)
    assert said is not None
    least = int(said[1].replace(",", ""))
    for free, serves in ((least, True), (least - 1, False)):
        there = turbofit.predict("internvl2-8b", free_at_cache=free * MIB, **asked).verdict
        # It serves, though with nothing of its margin.
        assert (" keeps 0 B free in the worst case" in there) is serves
    assert said[2] in there
    assert "image" in said[2]
    assert "with less than" not in turbofit.predict("llama-2-7b", **asked).verdict


def test_a_budget_that_is_not_kept_has_the_plan_that_keeps_it():
    plan = turbofit.predict("llava-1.5-7b", on="1xl4", budget="19GiB")
    assert "too much for the budget of 19.0 GiB" in plan.verdict
    assert "free" not in plan.verdict
    assert memory_label(plan.ledgers[0]).endswith("more than the budget")
    assert plan.remedies[0].change.startswith("turbofit's plan: --tp 1")


def test_a_cache_that_holds_no_image_serves_none():
    def told(blocks, **asked):
        settings = {"on": "1xa100", "engine": "pytorch", "num_gpu_blocks": blocks}
        return turbofit.predict("internvl2-8b", **settings, **asked)

    none, larger, whole = told(5), told(20), told(120)
    assert not none.fits
    assert all(one.fits for one in (told(5, images=0), larger, whole))
    assert none.verdict.endswith(f"takes 256 tokens of a cache of {none.engines[0].kv.tokens}")
    warning = f"take 6,400 tokens, and the cache holds {larger.engines[0].kv.tokens:,}"
    assert any(warning in text for text in larger.warnings)
    assert not any("largest images" in text for text in whole.warnings)


def test_no_engine_is_split_over_mig_instances():
    whole = machine_from("2xa100-80g")
    cut = replace(whole, gpus=tuple(replace(gpu, mig=True) for gpu in whole.gpus))
    for told in (turbofit.plan, turbofit.predict):
        with pytest.raises(UsageError, match="MIG slices"):
            told("internvl2-2b", on=cut, tp=2)
    assert turbofit.predict("internvl2-2b", on=cut, replicas=2).fits
    assert turbofit.predict("internvl2-2b", on=whole, tp=2).fits


def test_an_older_account_that_is_little_too_high_says_that_it_is_at_the_edge() -> None:
    """lmdeploy#3006: an RTX 3060 Ti of 8 GB ran this model with 0.6.5."""
    asked = {"lmdeploy": "0.6.4", "max_batch_size": 1}
    edge = turbofit.predict("qwen2.5-7b-awq", on="1xrtx3070", **asked)
    assert not edge.fits
    assert "at the edge (this account may be too high by 256 MiB): runs out" in (edge.verdict)
    assert "at the edge" not in turbofit.predict("qwen2.5-7b", on="1xrtx3070", **asked).verdict


def test_free_memory_that_a_log_told_has_a_way_out_or_none() -> None:
    settings = {"on": "4xrtx3090", "tp": 4, "engine": "pytorch"}
    died = turbofit.predict("internvl2-4b", **settings, free_at_cache="2GiB")
    assert not died.fits
    (way,) = died.remedies
    name, value = way.change.split()
    assert name == "--cache-max-entry-count"
    lower = turbofit.predict(
        "internvl2-4b", **settings, free_at_cache="2GiB", cache_max_entry_count=float(value)
    )
    assert way.effect == f"lives, with {lower.engines[0].kv.tokens:,} KV tokens"
    none = turbofit.predict("internvl2-4b", **settings, free_at_cache="64MiB")
    assert [remedy.change for remedy in none.remedies] == ["free the GPUs, or send smaller images"]
