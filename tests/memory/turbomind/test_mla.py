"""GLM-4.7-Flash in TurboMind's account, against the 0.18.0 binary on pretend GPUs. MiB."""

from __future__ import annotations

import pytest

from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.turbomind.cache import block_bytes
from turbofit.memory.turbomind.pool import Forward, PoolModel
from turbofit.memory.turbomind.weights import load_constants, weight_classes
from turbofit.model.source import resolve_model

MODEL = resolve_model("glm-4.7-flash")


@pytest.mark.parametrize(("tp", "mib"), [(1, 58_318), (2, 29_288)])
def test_weights_are_the_engines_in_whole_pages(tp: int, mib: int) -> None:
    held = sum(weight_classes(MODEL, tp, load_constants("0.18")).values()) / MIB
    assert mib - 2 < held <= mib


def test_attention_is_absorbed_and_padded() -> None:
    text = MODEL.text
    classes = weight_classes(MODEL, 2, load_constants("0.18"))
    into = 2048 * (768 + 512 + 64)
    assert classes["attention"] == 47 * 2 * (into + 768 * 10 * 576 + 10 * 576 * 2048)
    assert text.heads * text.head_dim == 20 * 576


@pytest.mark.parametrize(("tp", "policy", "row"), [(1, 0, 1152), (4, 0, 1152), (1, 8, 580)])
def test_a_token_is_cached_once_on_each_rank(tp: int, policy: int, row: int) -> None:
    settings = Settings(tp=tp, quant_policy=policy)
    assert block_bytes(MODEL.text, settings) == 47 * 64 * row


@pytest.mark.parametrize(
    ("batch", "tp", "capability", "warm_up", "prompt"),
    [
        (384, 1, (8, 0), 462.79, 481.63), (384, 2, (8, 0), 240.85, 270.09),
        (1024, 1, (9, 0), 497.32, None),
    ],
)  # fmt: skip
def test_forwards_hold_what_the_engine_held(
    batch: int, tp: int, capability: tuple[int, int], warm_up: float, prompt: float | None
) -> None:
    """A warm-up runs the first layer alone, which has no experts."""
    settings = Settings(max_batch_size=batch, session_len=32768, tp=tp)
    pool = PoolModel(MODEL, settings, load_constants("0.18"), capability)
    tokens = settings.max_prefill_token_num + batch
    found = pool.peak(Forward(tokens=tokens, context=tokens, first_layer=True)) / MIB
    assert warm_up <= found < warm_up + 0.1
    if prompt is not None:
        found = pool.peak(Forward(tokens=tokens, context=32704)) / MIB
        assert prompt <= found < prompt * 1.03
