"""From free memory to tokens."""

from __future__ import annotations

import pytest

from tests.memory.conftest import Case
from turbofit.core.units import MIB
from turbofit.memory.turbomind.cache import block_bytes, cache_shape, tokens_held
from turbofit.model.source import resolve_model


@pytest.mark.parametrize(
    ("model", "tp", "policy", "block"),
    [
        ("internvl2-8b", 1, 0, 8388608),
        ("internvl2-8b", 4, 0, 2097152),
        ("internvl2-8b", 4, 8, 1081344),
        ("qwen2-vl-7b", 2, 0, 1835008),
        ("qwen2-vl-7b", 8, 0, 917504),  # 4 KV heads repeated to 8: no smaller than at tp 4
    ],
)
def test_block_bytes_as_the_engine_logged_them(model, tp, policy, block):
    settings = Case(model, tp).settings(quant_policy=policy)
    assert block_bytes(resolve_model(model).text, settings) == block


def test_slab_grows_until_it_wastes_little(constants):
    """InternVL2-26B at tp 2: blocks of 6 MiB in slabs of 128 MiB, 21 each, as the engine logged."""
    shape = cache_shape(
        resolve_model("internvl2-26b").text, Case("internvl2-26b", 2).settings(), constants
    )
    assert (shape.block_bytes, shape.slab_bytes) == (6291456, 134217728)
    assert shape.blocks_per_slab == 21


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
def test_tokens_are_under_by_less_than_a_slab(constants, model, tp, changes, region, tokens):
    """Measured tokens; the address of the first page may cost one, which the forecast charges."""
    shape = cache_shape(resolve_model(model).text, Case(model, tp).settings(**changes), constants)
    forecast = tokens_held(int(region * MIB), shape, constants)
    slab = shape.blocks_per_slab * shape.block_tokens
    assert tokens - 2 * slab <= forecast <= tokens
    assert forecast % slab == 0


def test_no_tokens_without_a_slab(constants):
    shape = cache_shape(
        resolve_model("internvl2-8b").text, Case("internvl2-8b").settings(), constants
    )
    assert tokens_held(constants.page_size, shape, constants) == 0
    assert tokens_held(0, shape, constants) == 0
