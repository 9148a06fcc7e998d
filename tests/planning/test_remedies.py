"""A plan that does not fit names what the person can change, first."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import turbofit
from turbofit.core.machine import Holder, Machine
from turbofit.machine.source import machine_from

pytestmark = pytest.mark.slow


def verdict(on: str = "1xrtx3090", model: str = "internvl2-8b", **asked: object) -> str:
    plan = turbofit.plan(model, on=on, **asked)
    assert not plan.fits
    return plan.verdict


@pytest.mark.parametrize(
    ("asked", "option", "arithmetic"),
    [
        ({"max_batch_size": 100_000}, "--max-batch-size 100000", "in one forward 174 GiB"),
        ({"max_dynamic_patch": 1000}, "--max-dynamic-patch 1000", "256,256 tokens, which do not"),
        ({"budget": "16GiB"}, "--budget 16.0 GiB", "weights 15.1 GiB"),
        ({"session_len": 100}, "--session-len 100", "do not fit a context of 100"),
        ({"enable_prefix_caching": True, "context": 1}, "--context 1", "3,328 tokens"),
        ({"margin": "9GiB"}, "--margin 9.0 GiB", "short of the margin of 9.0 GiB"),
        ({"margin": "40%"}, "--margin 40%", "short of the margin of 9.6 GiB"),
    ],
)
def test_an_option_without_which_it_fits_is_the_cause(
    asked: dict[str, object], option: str, arithmetic: str
) -> None:
    plan = turbofit.plan("internvl2-8b", on="1xrtx3090", **asked)
    assert plan.verdict.startswith(f"does not fit: InternVL2-8B with {option}: ")
    assert arithmetic in plan.verdict
    assert plan.remedies[0].change.startswith(f"leave {option.split(maxsplit=1)[0]} ")
    assert plan.remedies[0].effect.startswith("fits")


def test_memory_is_told_as_a_sum_of_the_card_and_what_others_hold_comes_first() -> None:
    """Weights that nobody can shrink were blamed by their largest part, `weights.mlp`."""
    both = verdict(context=1, max_batch_size=100_000)
    assert both.startswith("does not fit: InternVL2-8B: ")  # neither is to blame alone
    said = verdict("1xrtx3090:free=6GiB")
    assert "load peak of 35.2 GiB (others hold 17.6 GiB, weights 15.1 GiB" in said
    said = verdict("1xrtx3090:total=14GiB", "llava-1.5-7b")
    assert "short of the margin of 256 MiB beside the least cache (weights 13.2 GiB" in said


def test_unequal_cards_are_told_why_they_share_no_4_bit_weights_and_what_would_do() -> None:
    """Four cards were named where two suffice, and the reason only where --tp 2 was typed."""
    plan = turbofit.plan("internvl2.5-38b-awq", on="rtx3090+rtx4090", engine="turbomind")
    first = "4-bit weights need cards of one generation, so an engine has 1 of 2 GPUs: "
    assert plan.verdict.startswith(f"does not fit: InternVL2.5-38B-AWQ: {first}")
    assert "2 x NVIDIA GeForce RTX 3090" in remedies("rtx3090+rtx4090", "internvl2.5-38b-awq")
    idle = turbofit.plan("internvl2.5-38b-awq", on="2xrtx3090+rtx4090", engine="turbomind")
    assert any("GPU 2" in text and "one generation" in text for text in idle.warnings)
    equal = turbofit.plan("internvl2.5-38b-awq", on="rtx3090", engine="turbomind")
    assert "generation" not in equal.verdict


def test_an_engine_over_unequal_cards_is_named_where_it_fits() -> None:
    """The search makes none unasked: a plan that --tp 2 serves was told to buy other weights."""
    effects = remedies("rtx3090+rtx4090", "internvl3-14b")
    change, effect = next(iter(effects.items()))
    assert (change.split(",")[0], effect[:4]) == ("--tp 2", "fits")
    asked = turbofit.plan("internvl3-14b", on="rtx3090+rtx4090", tp=2)
    assert f"{asked.engines[0].kv.tokens:,} KV tokens" in effect


def test_memory_that_nobody_explains_can_be_freed() -> None:
    effects = remedies("1xt4:free=1GiB", "internvl2-1b")
    change = "free the memory that others hold on GPU 0 (13.6 GiB)"
    assert next(iter(effects)) == change
    assert effects[change].startswith("fits: ")
    assert turbofit.plan("internvl2-1b", on="1xt4").fits


def test_a_margin_that_turbofit_doubled_is_nobodys_option() -> None:
    usual = turbofit.plan("internvl2-8b", on="1xrtx3060").ledgers[0].margin
    plan = turbofit.plan("internvl2-8b", on="1xrtx3060", margin=2 * usual)
    assert not plan.fits
    assert "--margin" not in plan.verdict
    assert not any("--margin" in remedy.change for remedy in plan.remedies)


def remedies(on: str | Machine, model: str = "internvl2-8b", **asked: object) -> dict[str, str]:
    plan = turbofit.plan(model, on=on, **asked)
    assert not plan.fits
    return {one.change: one.effect for one in plan.remedies}


def test_where_no_single_change_helps_which_names_other_cards() -> None:
    said = remedies("1xrtx3060", "internvl2-76b")
    assert next(iter(said.items())) == (
        "other cards", "turbofit which MODEL names the fewest that keep the promise"
    )  # fmt: skip


def test_host_memory_that_is_short_has_remedies_too() -> None:
    on = "2xa100-80g,ram={}GiB"
    said = remedies(on.format(6), replicas=2)
    assert list(said) == ["leave --replicas to turbofit", "free 4.0 GiB of host RAM"]
    assert verdict(on.format(6), replicas=2).startswith(
        "does not fit: InternVL2-8B with --replicas 2: host RAM is "
    )
    assert turbofit.plan("internvl2-8b", on=on.format(6)).fits
    fewer = turbofit.plan("glm-4v-9b", on="8xh100,ram=34GiB", concurrency=8)
    assert fewer.fits
    assert any("host memory is too small for" in text for text in fewer.reasons)
    assert turbofit.plan("internvl2-8b", on=on.format(10), replicas=2).fits
    dead = turbofit.plan("internvl2-8b", on="4xa100-80g,ram=2GiB")
    assert [one.change for one in dead.remedies] == ["free 5.0 GiB of host RAM"]
    assert dead.throughput is None  # what does not serve has no speed


def test_another_checkpoint_says_which_option_it_does_not_take() -> None:
    change = "use Qwen/Qwen2.5-14B-Instruct-AWQ (4-bit weights)"
    said = remedies("1xl4", "qwen2.5-14b", dtype="bfloat16", context=4096)
    assert said[f"{change}, and leave --dtype out"].startswith("fits: ")
    assert change in remedies("1xl4", "qwen2.5-14b", dtype="float16", context=4096)


def test_fp8_comes_before_more_cards_where_they_compute_it() -> None:
    """Two RTX 5090 hold it, and four were advised."""
    said = remedies("2xrtx5090", "qwen3-vl-30b-a3b")
    fp8, *rest = said
    assert fp8 == "use Qwen/Qwen3-VL-30B-A3B-Instruct-FP8 (FP8 weights)"
    assert said[fp8].startswith("fits: ")
    assert all(" x NVIDIA" in change for change in rest)
    older = remedies("1xrtx3090", "qwen3-vl-30b-a3b")
    assert not any("FP8" in change for change in older)


def test_a_size_of_pictures_leaves_the_image_limit_among_what_helps() -> None:
    asked = {"context": 8192, "images": 4, "image_size": (1920, 1080)}
    change, effect = next(iter(remedies("4xrtx3090", **asked).items()))
    name, limit = change.split()
    assert name == "--max-dynamic-patch"
    lower = turbofit.plan("internvl2-8b", on="4xrtx3090", max_dynamic_patch=int(limit), **asked)
    assert effect.startswith(f"fits: {lower.engines[0].kv.tokens:,} KV tokens")
    higher = {**asked, "max_dynamic_patch": int(limit) + 1}
    assert not turbofit.plan("internvl2-8b", on="4xrtx3090", **higher).fits


def test_a_process_is_stopped_on_all_its_gpus_and_frees_no_more_than_is_used() -> None:
    """Only one GPU's part was freed: under, and no remedy where the model needs both."""

    def with_holders(on: str, *holders: tuple[Holder, ...]) -> Machine:
        machine = machine_from(on)
        gpus = zip(machine.gpus, holders, strict=True)
        return replace(machine, gpus=tuple(replace(gpu, holders=by) for gpu, by in gpus))

    split, alone, large = (
        Holder(pid=pid, name=name, bytes=size << 30)
        for pid, name, size in ((7, "x", 10), (8, "y", 8), (7, "x", 20))
    )
    said = remedies(with_holders("2xrtx3090:used=18GiB", (split, alone), (split,)), tp=2)
    (change,) = [one for one in said if one.startswith("stop")]
    assert change == "stop x[7] on GPUs 0-1 (20.0 GiB)"
    freed = turbofit.plan("internvl2-8b", on="2xrtx3090:used=8GiB", tp=2)
    assert said[change] == f"fits: {freed.engines[0].kv.tokens:,} KV tokens a group, tp 2"
    said = remedies(with_holders("1xrtx3090:used=10GiB", (large,)), "qwen2.5-14b")
    assert said["stop x[7] on GPU 0 (20.0 GiB)"].startswith("not enough alone: ")


@pytest.mark.parametrize(
    ("on", "more", "model"),
    [
        ("1xh100", "2xh100", "llama-3.1-70b"),
        ("1xh100,nvlink=none", "2xh100", "llama-3.1-70b"),  # a card alone says nothing of links
        ("1xh100-pcie", "2xh100-pcie", "llama-3.1-70b"),
        ("2xa100-40g,nvlink=none", "4xa100-40g,nvlink=none", "mixtral-8x7b"),
        ("2xrtx3090,nvlink=0-1", "8xrtx3090,nvlink=0-1+2-3+4-5+6-7", "llama-3.1-70b"),
    ],
)
def test_more_of_a_card_promise_what_a_plan_on_them_does(on: str, more: str, model: str) -> None:
    """They had no links at all: NCCL took 870 MiB less of an H100 than it does over NVLink."""
    plan = turbofit.plan(model, on=more)
    change = f"{more[0]} x {plan.machine.gpus[0].name}"
    effects = {one.change: one.effect for one in turbofit.plan(model, on=on).remedies}
    assert effects[change].startswith(f"fits: {plan.engines[0].kv.tokens:,} KV tokens")
