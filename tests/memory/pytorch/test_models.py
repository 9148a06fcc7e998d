"""What single models take of the PyTorch engine beside the others, against it on pretend GPUs.

Figures in MiB by torch's own allocator (bench/rehearsal/PLANNED.md), of the first layers of a model
where it is cut: of one rank's weights, and live above what stayed afterwards in a prefill.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS, account, tp_problem
from turbofit import api
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import PytorchAccount
from turbofit.memory.pytorch.activations import Activations, Prefill, activations_of
from turbofit.memory.pytorch.cache import block_bytes, state_bytes
from turbofit.memory.pytorch.weights import expert_channels, largest_loaded, weight_classes
from turbofit.memory.start_outcome import outcome_at
from turbofit.model.parameters import parameters
from turbofit.model.source import resolve_model


def cut(name: str, layers: int, experts: int = 0, *, packed: bool = True) -> Model:
    """A preset of fewer layers, and of fewer experts."""
    model = resolve_model(name)
    moe = model.text.moe
    if moe is not None:
        dense = model.text.layers - moe.layers
        moe = replace(moe, layers=layers - dense, experts=experts or moe.experts)
    quantization = model.quantization if packed else None
    text = replace(model.text, layers=layers, moe=moe)
    return replace(model, text=text, quantization=quantization)


@pytest.mark.parametrize(
    ("model", "tp", "mib"),
    [
        (cut("gpt-oss-20b-bf16", 2), 1, 5349.4), (cut("glm-4.5-air", 3), 1, 11_766.6),
        (cut("deepseek-moe-16b", 3), 1, 3_202.8), (cut("phi-3.5-moe", 4), 1, 10_421.8),
        (cut("phi-3.5-moe", 4), 2, 5461.8), (cut("deepseek-moe-16b", 4), 1, 4324.0),
        (cut("deepseek-moe-16b", 4), 2, 2562.4), (cut("kimi-k2.5", 3, 48), 1, 9_150.7),
        (cut("kimi-k2.5", 3, 48), 2, 6_188.7), (cut("kimi-k2.5", 2, 384), 1, 15_681.7),
        (cut("kimi-k2.5", 2, 48, packed=False), 1, 10_637.1), (cut("minicpm3-4b", 4), 1, 836.8),
        (resolve_model("minicpm3-4b"), 1, 7770.3), (resolve_model("glm-4.7-flash"), 1, 57_523.7),
        (resolve_model("deepseek-v2-lite"), 1, 30_065.7),
        (resolve_model("deepseek-v2-lite"), 2, 15_066.6),
        (cut("qwen3-omni-30b-a3b", 4), 1, 8212.5),
        (cut("intern-s1-pro", 4, 64, packed=False), 1, 12_832.3),
    ],
)  # fmt: skip
def test_weights_are_the_engines(model: Model, tp: int, mib: float) -> None:
    assert sum(weight_classes(model, tp).values()) / MIB == pytest.approx(mib, abs=0.1)


@pytest.mark.parametrize(
    ("model", "tokens", "context", "seen", "more"),
    [
        (cut("gpt-oss-20b-bf16", 2), 2048, 34_816, 470.4, 42),
        (cut("glm-4.5-air", 3), 4096, 36_864, 939.7, 84),
        (cut("deepseek-moe-16b", 3), 4000, 36_768, 624.1, 56),
        # Its kernels are picked where neither a residual nor a sum is alive yet.
        (cut("phi-3.5-moe", 2), 8192, 8192, 1180.6, 131),
        (cut("deepseek-v2-lite", 5, packed=False), 8192, 32_768, 1006.88, 10),
        (cut("glm-4.7-flash", 5, packed=False), 8192, 32_768, 834.63, 8),
        (cut("deepseek-v3", 4, 16, packed=False), 8192, 32_768, 3140.50, 31),
        # Logits of this forward and of the one before; or of this one, beside a long prompt.
        (cut("minicpm3-4b", 2), 4096, 12_000, 1187.76, 4),
        (cut("minicpm3-4b", 2), 1024, 29_760, 647.62, 4),
    ],
)
def test_a_prefill_holds_what_the_engine_held(model, tokens, context, seen, more):
    work = activations_of(model, Settings(max_batch_size=16), CONSTANTS)
    paid = work.prefill(Prefill(tokens=tokens, context=context)) / MIB
    assert seen <= paid <= seen + more


def prefill(model: Model, tokens: int = 8192, *, tp: int = 1, **forward: int) -> int:
    work = Activations(model, Settings(tp=tp), CONSTANTS)
    return work.prefill(Prefill(**{"tokens": tokens, "context": tokens, **forward}))


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "glm-4.5-air", "qwen3.5-35b-a3b"])
def test_a_layer_s_experts_are_laid_out_anew_on_each_rank(name: str) -> None:
    model = resolve_model(name)
    moe = model.text.moe
    layer = moe.experts * 3 * moe.intermediate * model.text.hidden * 2
    assert [largest_loaded(model, tp) for tp in (1, 2, 4)] == [layer, layer // 2, layer // 4]
    (ledger,) = account(name, on="1xh200").ledgers_at(0.5)
    assert ledger.load_peak >= sum(t.bytes for t in ledger.terms if t.phase == "weights") + layer


@pytest.mark.parametrize(
    ("name", "layers", "mib"),
    [
        ("qwen3-vl-30b-a3b", 4, 4892.65), ("qwen3-vl-30b-a3b", 6, 6189.67),
        ("qwen3-omni-30b-a3b", 4, 5127.2),
    ],
)  # fmt: skip
def test_weights_of_each_of_two_ranks_are_the_engines(name: str, layers: int, mib: float) -> None:
    """Qwen3-VL keeps the dense model that it made first; one rank alone frees it."""
    model = cut(name, layers)
    assert mib <= sum(weight_classes(model, 2).values()) / MIB <= mib + 1
    if "vl" in name:
        assert sum(weight_classes(model, 1).values()) == 2 * parameters(model.text, model.vision)


@pytest.mark.parametrize(("tp", "channels"), [(1, 768), (4, 256), (8, 128)])
def test_experts_of_fp8_are_dealt_in_whole_blocks(tp: int, channels: int) -> None:
    """768 channels are six blocks of 128: of four ranks the first two have two of them."""
    model = resolve_model("qwen3-30b-a3b")
    packed = replace(model, quantization=Quantization(method="fp8", bits=8, group_size=128))
    assert Activations(packed, Settings(tp=tp), CONSTANTS).expert == channels
    assert expert_channels(model, tp) == 768 // tp


@pytest.mark.parametrize(
    ("name", "tp", "size"),
    [
        # Latents are keys alone, of one head.
        ("glm-4.7-flash", 1, 47 * 32 * 576 * 2), ("glm-4.7-flash", 4, 47 * 32 * 576 * 2),
        # MiniCPM3's are expanded before they are cached: each head's keys and padded values.
        ("minicpm3-4b", 1, 62 * 64 * 40 * 2 * (64 + 32) * 2),
        # LMDeploy cuts no layer's attention of Llama 4 into chunks of 8192 tokens.
        ("llama-4-scout", 1, 2 * 48 * 8 * 64 * 128 * 2),
        # Only attention has keys and values, not delta nets.
        ("qwen3.5-27b", 1, 2 * 16 * 4 * 64 * 256 * 2),
    ],
)  # fmt: skip
def test_what_a_block_holds(name: str, tp: int, size: int) -> None:
    assert block_bytes(resolve_model(name).text, Settings(tp=tp)) == size


def test_ranks_keep_whole_groups() -> None:
    model = resolve_model("kimi-k2.5")
    narrow = replace(model, text=replace(model.text, moe=replace(model.text.moe, intermediate=96)))
    assert "groups of 32" in str(tp_problem(narrow, 2))
    assert tp_problem(replace(narrow, quantization=None), 2) is None


def test_the_worst_image_of_qwen3_omni_is_never_under() -> None:
    """50,176 patches in one forward: 1,797.0 MiB live on pretend GPUs."""
    plan = api.plan("qwen3-omni-30b-a3b", on="1xa100-80g", engine="pytorch")
    terms = {term.term: term.bytes for term in plan.ledgers[0].terms}
    seen = int(1797.0 * MIB)
    assert plan.engines[0].units_per_forward == 50_176
    assert seen <= terms["vision_forward"] <= seen + 0.03 * plan.ledgers[0].total
    assert not plan.takes_videos


#: Of the 27B: 48 layers of 10,240 channels and 48 heads of 128 x 128.
WINDOW, STATE = 48 * 10_240 * 4 * 2, 48 * 48 * 128 * 128 * 2


def ledger(one: PytorchAccount, ratio: float = 0.5) -> dict[str, int]:
    return {term.term: term.bytes for term in one.ledgers_at(ratio)[0].terms}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_slot_for_each_sequence_and_two(tp: int) -> None:
    text = resolve_model("qwen3.5-27b").text
    for settings in (Settings(), Settings(session_len=10, quant_policy=8)):
        slots = state_bytes(text, replace(settings, tp=tp, max_batch_size=8))
        assert slots == 10 * (WINDOW + STATE) // tp
    assert state_bytes(resolve_model("qwen3-vl-8b").text, Settings()) == 0


def test_states_come_off_what_is_free_before_the_ratio() -> None:
    free = 20_000 * MIB
    one = account("qwen3.5-27b", on="1xh100", free=free, max_batch_size=8)
    runtime = (8192 + 2 * 8) * 248_320 * 2
    assert one.ratio_base == free - 10 * (WINDOW + STATE) - runtime
    blocks = int(one.ratio_base * 0.8) // one.block_bytes
    assert one.region_at(0.8) == blocks * one.block_bytes
    found = ledger(one)
    assert 0 <= found["state_cache"] - 10 * (WINDOW + STATE) < CONSTANTS.page
    assert list(found).index("state_cache") == list(found).index("kv_cache") + 1
    assert "state_cache" not in ledger(account("qwen2-vl-7b"))
    most = account("qwen3.5-27b", on="1xh100", max_batch_size=512)
    assert most.best_ratio() is None
    fate = outcome_at(most, 0.8)
    assert (fate.kind, "state_cache 38.0 GiB" in fate.text) == ("buffers", True), fate.text
