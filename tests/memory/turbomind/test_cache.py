"""TurboMind's cache as its log shows it: blocks, slabs, tokens, and states of sequences."""

from __future__ import annotations

import pytest

import turbofit
from tests.memory.conftest import Case
from tests.memory.turbomind.test_weights import CONSTANTS, SMALL
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.turbomind.cache import block_bytes, cache_shape
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("model", "tp", "policy", "block"),
    [
        ("internvl2-8b", 1, 0, 8388608),
        ("internvl2-8b", 4, 0, 2097152),
        ("internvl2-8b", 4, 8, 1081344),
        ("qwen2-vl-7b", 2, 0, 1835008),
        ("qwen2-vl-7b", 8, 0, 917504),  # 4 KV heads repeated to 8: no smaller than at tp 4
        # A latent is cached once on each rank.
        ("glm-4.7-flash", 1, 0, 47 * 64 * 1152),
        ("glm-4.7-flash", 4, 0, 47 * 64 * 1152),
        ("glm-4.7-flash", 1, 8, 47 * 64 * 580),
    ],
)
def test_block_bytes_as_the_engine_logged_them(model, tp, policy, block):
    settings = Case(model, tp).settings(quant_policy=policy)
    assert block_bytes(resolve_model(model).text, settings) == block


@pytest.mark.parametrize(
    ("model", "tp", "changes", "region", "tokens"),
    [
        ("internvl2-8b", 1, {}, 6851.2, 54784),
        ("internvl2-8b", 2, {}, 13011.2, 207872),
        ("internvl2-8b", 4, {"quant_policy": 8}, 16076.8, 995968),
        ("internvl2-26b-awq", 2, {}, 8633.6, 90048),
        ("qwen2-vl-7b", 1, {}, 6329.6, 113472),
        ("qwen2-vl-2b", 1, {}, 7627.2, 274176),
    ],
)
def test_tokens_are_under_by_less_than_a_slab(model, tp, changes, region, tokens):
    """Measured tokens; the address of the first page may cost one, which the forecast charges."""
    shape = cache_shape(resolve_model(model).text, Case(model, tp).settings(**changes), CONSTANTS)
    forecast = shape.tokens_beside(int(region * MIB), 1)
    slab = shape.blocks_per_slab * shape.block_tokens
    assert tokens - 2 * slab <= forecast <= tokens
    assert forecast % slab == 0


SETTINGS = Settings(tp=1, max_batch_size=128, session_len=32768)


def test_a_running_sequence_has_a_state_in_the_cache() -> None:
    """A MiB of state for each of 24 layers, and 1.5 MiB of the convolutions' inputs."""
    shape = cache_shape(SMALL.text, SETTINGS, CONSTANTS)
    assert (shape.state_bytes, shape.block_bytes) == (25.5 * MIB, 2 * MIB)
    assert [part.per_slab for part in shape.states] == [21, 32]
    region = 225 * 32 * MIB  # one page is lost to alignment
    assert shape.tokens_beside(region, 1) == (224 - 2) * 16 * 64
    # 7 slabs of 21 objects, and 96 of 32
    assert shape.tokens_beside(region, 128) == (224 - 7 - 96) * 16 * 64


def test_a_large_batch_leaves_one_request_its_context() -> None:
    """States of 128 sequences are more than this cache; the engine then runs fewer at once."""
    few, many = (
        turbofit.predict(
            "qwen3.5-9b", on="1xrtx3090", engine="turbomind", tp=1, max_batch_size=batch,
            session_len=8192, max_prefill_token_num=2048, cache_max_entry_count=0.5,
        )
        for batch in (8, 128)
    )  # fmt: skip
    assert few.verdict == many.verdict
    assert few.engines[0].kv.tokens > many.engines[0].kv.tokens
    assert many.promise.context == 8192
