"""Multi-head latent attention in the PyTorch engine's account, against that engine on pretend GPUs.

Peaks are of torch's allocator, of prefills of 8192 tokens with 16 rows: DeepSeek-V2-Lite with 5
layers, GLM-4.7-Flash with 5, DeepSeek-V3 with 4 of which one has 16 experts.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS, account
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import cache_problem, tp_problem
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.cache import block_bytes, block_tokens
from turbofit.memory.pytorch.weights import largest_loaded, weight_classes
from turbofit.model.source import resolve_model

PROMPT = 32768


def smaller(name: str, layers: int, experts: int = 0) -> Model:
    """A preset of fewer layers, in 16 bits."""
    model = resolve_model(name)
    moe = model.text.moe
    assert moe is not None
    dense = model.text.layers - moe.layers
    moe = replace(moe, layers=layers - dense, experts=experts or moe.experts)
    return replace(model, quantization=None, text=replace(model.text, layers=layers, moe=moe))


@pytest.mark.parametrize(
    ("name", "tp", "mib"),
    [
        ("deepseek-v2-lite", 1, 30_065.7), ("deepseek-v2-lite", 2, 15_066.6),
        ("glm-4.7-flash", 1, 57_523.7),
    ],
)  # fmt: skip
def test_weights_are_the_engines(name: str, tp: int, mib: float) -> None:
    classes = weight_classes(resolve_model(name), tp)
    assert sum(classes.values()) / MIB == pytest.approx(mib, abs=0.05)


def test_latents_are_whole_on_every_rank() -> None:
    text = resolve_model("glm-4.7-flash").text
    mla = text.mla
    assert mla is not None
    one, four = (weight_classes(resolve_model("glm-4.7-flash"), tp) for tp in (1, 4))
    whole = text.layers * text.hidden * (mla.q_rank + mla.kv_rank + mla.rope_dim) * 2
    assert four["attention"] == whole + (one["attention"] - whole) // 4
    assert four["norms"] == one["norms"]
    assert [four[name] * 4 for name in ("embedding", "lm_head")] == [one["embedding"]] * 2
    for tp in (1, 4):
        size = block_bytes(text, Settings(tp=tp))
        assert size == text.layers * 32 * 576 * 2  # keys alone, of one head


@pytest.mark.parametrize(("asked", "held"), [(64, 32), (32, 32), (16, 16)])
def test_wide_heads_have_short_blocks(asked: int, held: int) -> None:
    settings = Settings(cache_block_seq_len=asked)
    assert block_tokens(resolve_model("deepseek-v2-lite").text, settings) == held
    assert block_tokens(resolve_model("qwen3-8b").text, settings) == asked
    assert account("deepseek-v2-lite", on="1xa100-40g").block_tokens == 32


@pytest.mark.parametrize(
    ("name", "layers", "experts", "mib"),
    [
        ("deepseek-v2-lite", 5, 0, 1006.88), ("glm-4.7-flash", 5, 0, 834.63),
        ("deepseek-v3", 4, 16, 3140.50),
    ],
)  # fmt: skip
def test_a_prefill_holds_what_the_engine_held(
    name: str, layers: int, experts: int, mib: float
) -> None:
    work = Activations(smaller(name, layers, experts), Settings(max_batch_size=16), CONSTANTS)
    found = work.prefill(Prefill(tokens=8192, context=PROMPT, sequences=1)) / MIB
    assert mib <= found <= mib * 1.01


def test_a_long_context_is_flattened_once() -> None:
    work = Activations(resolve_model("deepseek-v2-lite"), Settings(max_batch_size=1), CONSTANTS)
    long, longer = (work.prefill(Prefill(tokens=64, context=n)) for n in (1 << 20, 1 << 21))
    assert longer - long == (1 << 20) * 576 * 2


def test_a_decoding_step_keeps_the_outputs_of_its_parts() -> None:
    model = resolve_model("deepseek-v3")
    eight = Activations(model, Settings(tp=8), CONSTANTS).decode(256)
    assert eight >= 256 * (128 // 8) * 4 * (512 + 2) * 4
    assert Activations(model, Settings(tp=1), CONSTANTS).decode(256) > 4 * eight


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "qwen3-30b-a3b"])
def test_experts_of_16_bits_are_laid_out_anew(name: str) -> None:
    model = resolve_model(name)
    moe = model.text.moe
    assert moe is not None
    layer = moe.experts * 3 * moe.intermediate * model.text.hidden * 2
    assert largest_loaded(model, 1) == layer
    assert largest_loaded(model, 2) == layer // 2
    held = account(name, on="1xa100-80g")
    weights = sum(t.bytes for t in held.at(0.5).ledgers[0].ledger if t.phase == "weights")
    assert held.at(0.5).ledgers[0].load_peak >= weights + layer


def test_what_is_refused() -> None:
    model = resolve_model("glm-4.7-flash")
    assert tp_problem(model, 4) is None
    assert "20 attention heads" in (tp_problem(model, 8) or "")
    assert cache_problem(model, Settings()) is None
    assert "latent attention" in (cache_problem(model, Settings(quant_policy=8)) or "")
