"""The account of older PyTorch engines: the reserve for a forward, and blocks."""

from __future__ import annotations

import pytest

from tests.memory.legacy.test_turbomind import launch_of
from turbofit.core.units import MIB
from turbofit.memory.legacy.generations import (
    torch_generation_of,
)
from turbofit.memory.legacy.pytorch import LegacyPytorch, LegacyTorchAccount
from turbofit.memory.turbomind.weights import load_constants

# The vision tower under torch.


def torch_account(name, version, *, tp=1, on="a100-80g", **changes):
    rules = torch_generation_of(version)
    return LegacyTorchAccount(launch_of(name, rules, tp, on, **changes), load_constants(), rules)


def test_blocks_by_the_formula_of_the_old_and_the_new_reserve():
    free, vocab, block = 20000 * MIB, 152064, 64 * 28 * 4 * 2 * 128 * 2
    old = torch_account("qwen2-vl-7b", "0.7.2", free=free, max_batch_size=128)
    assert (old.block_bytes, old.runtime) == (block, 8192 * vocab * 7)
    assert old.blocks_at(0.8) == int((free - old.runtime) * 0.8) // block
    new = torch_account("qwen2-vl-7b", "0.10.2", free=free, max_batch_size=128)
    assert new.runtime == (8192 + 256) * vocab * 2
    # The reserve is halved until 16 blocks fit.
    few = torch_account("qwen2-vl-7b", "0.7.2", free=1400 * MIB, max_batch_size=128)
    assert few.runtime == 1024 * vocab * 7
    assert few.blocks_at(0.8) >= 16
    none = torch_account("qwen2-vl-7b", "0.7.2", free=2 * MIB, max_batch_size=128)
    assert none.cache_shortfall_at(0.8)


@pytest.mark.parametrize(
    ("version", "ratio", "prefill", "reserve"),
    [
        ("0.2.0", 0.7, 16384, 0), ("0.2.3", 0.7, 16384, 0), ("0.2.5", 0.8, 8192, 0),
        ("0.2.6", 0.8, 4096, 4096 * 32000 * 7), ("0.6.0", 0.8, 8192, 8192 * 32000 * 7),
    ],
)  # fmt: skip
def test_the_first_releases_had_defaults_of_their_own(version, ratio, prefill, reserve):
    told = LegacyPytorch(version).defaults("a100")
    made = torch_account("llama-2-7b", version, free=20000 * MIB)
    assert (told["cache_max_entry_count"], told["max_prefill_token_num"], made.runtime) == (
        ratio, prefill, reserve,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "bits"), [(8, 128 * 16 + 64), (16, 128 * 16), (42, 128 * 6 + 48)]
)
def test_a_block_is_as_large_as_its_quantisation_makes_it(policy, bits):
    """fp8 has no scales; TurboQuant 4 bits a key and 2 a value, and three scales a head."""
    made = torch_account("qwen2-vl-7b", "0.17", free=20000 * MIB, quant_policy=policy)
    assert made.block_bytes == 64 * 28 * 4 * bits // 8
