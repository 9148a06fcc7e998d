"""The account of the PyTorch engine before 0.18."""

from __future__ import annotations

import pytest

from tests.memory.legacy.conftest import launch_of, terms
from turbofit.core.units import MIB
from turbofit.memory.legacy.generations import torch_generation_of
from turbofit.memory.legacy.pytorch import LegacyTorchAccount
from turbofit.memory.turbomind.weights import load_constants
from turbofit.model.source import resolve_model


def account(name, version, *, tp=1, on="a100-80g", **changes):
    rules = torch_generation_of(version)
    launch = launch_of(name, rules, tp, on, **changes)
    return LegacyTorchAccount(launch, load_constants(), rules)


def test_blocks_by_the_formula_of_the_old_and_the_new_reserve():
    free, vocab, block = 20000 * MIB, 152064, 64 * 28 * 4 * 2 * 128 * 2
    old = account("qwen2-vl-7b", "0.7.2", free=free, max_batch_size=128)
    assert old.block_bytes == block
    assert old.runtime == 8192 * vocab * 7
    assert old.blocks_at(0.8) == int((free - old.runtime) * 0.8) // block
    new = account("qwen2-vl-7b", "0.10.2", free=free, max_batch_size=128)
    assert new.runtime == (8192 + 256) * vocab * 2


@pytest.mark.parametrize(
    ("policy", "bits"), [(8, 128 * 16 + 64), (16, 128 * 16), (42, 128 * 6 + 48)]
)
def test_a_block_is_as_large_as_its_quantisation_makes_it(policy, bits):
    """fp8 has no scales; TurboQuant 4 bits a key and 2 a value, and three scales a head."""
    made = account("qwen2-vl-7b", "0.17", free=20000 * MIB, quant_policy=policy)
    assert made.block_bytes == 64 * 28 * 4 * bits // 8


def test_the_reserve_is_halved_until_16_blocks_fit():
    made = account("qwen2-vl-7b", "0.7.2", free=1400 * MIB, max_batch_size=128)
    assert made.runtime == 1024 * 152064 * 7
    assert made.blocks_at(0.8) >= 16


def test_cache_shortfall_below_three_blocks():
    made = account("qwen2-vl-7b", "0.7.2", free=2 * MIB, max_batch_size=128)
    assert made.cache_shortfall_at(0.8)


def test_the_server_s_own_context_is_charged_where_ranks_are_processes():
    assert "server_context" not in terms(account("qwen2-vl-7b", "0.5.2"), 0.5)
    assert "server_context" in terms(account("qwen2-vl-7b", "0.5.2", tp=2), 0.5)


def test_the_tower_is_whole_on_every_rank_since_it_is_part_of_the_model():
    spread, whole = (
        [
            terms(account("qwen2-vl-7b", version, tp=2), 0.5, i)["weights.vision_tower"]
            for i in (0, 1)
        ]
        for version in ("0.5.2", "0.7.0")
    )
    assert whole[0] == whole[1] > max(spread)


def test_images_of_a_request_meet_in_one_forward_since_0_7():
    one = account("qwen2-vl-7b", "0.7.2", images=1)
    three = account("qwen2-vl-7b", "0.7.2", images=3)
    assert three.units_per_forward == 3 * one.units_per_forward
    assert account("qwen2-vl-7b", "0.5.2", images=3).units_per_forward == one.units_per_forward


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_a_prefill_holds_what_all_chosen_experts_make(name):
    made = account(name, "0.11.0", tp=2, session_len=4096)
    text, tokens = resolve_model(name).text, made.settings.max_prefill_token_num
    moe = text.moe
    each = moe.experts_per_token * (3 * moe.intermediate // 2 + text.hidden)
    prefill = next(t.bytes for t in made.transients if t.term == "text_prefill")
    assert prefill >= tokens * (each + 4 * text.hidden) * 2
