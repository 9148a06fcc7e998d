"""What experts take in the PyTorch engine's account, beside what it did on pretend GPUs.

Figures in MiB by torch's own allocator (bench/rehearsal/PLANNED.md), of the first layers of each
model: live above what stayed afterwards, in the longest prefill.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS
from turbofit.core.model import Model, Quantization
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.weights import expert_channels, largest_loaded, weight_classes
from turbofit.model.parameters import parameters
from turbofit.model.source import resolve_model


def cut(name: str, layers: int) -> Model:
    model = resolve_model(name)
    assert model.text.moe is not None
    dense = model.text.layers - model.text.moe.layers
    moe = replace(model.text.moe, layers=layers - dense)
    return replace(model, text=replace(model.text, layers=layers, moe=moe))


@pytest.mark.parametrize(
    ("name", "layers", "weights", "tokens", "seen"),
    [
        ("gpt-oss-20b-bf16", 2, 5349.4, 2048, 470.4),
        ("glm-4.5-air", 3, 11_766.6, 4096, 939.7),
        ("deepseek-moe-16b", 3, 3_202.8, 4000, 624.1),
    ],
)
def test_as_the_engine_allocated_it(
    name: str, layers: int, weights: float, tokens: int, seen: float
) -> None:
    model, settings = cut(name, layers), Settings(max_prefill_token_num=tokens)
    assert sum(weight_classes(model, 1).values()) / MIB == pytest.approx(weights, abs=0.1)
    work = Activations(model, settings, CONSTANTS)
    paid = work.prefill(Prefill(tokens=tokens, context=32768 + tokens)) / MIB
    assert seen <= paid < 1.09 * seen


def test_picking_a_kernel_is_paid_once_in_a_prefill_of_any_length() -> None:
    work = Activations(cut("glm-4.5-air", 3), Settings(), CONSTANTS)
    one, two = (work.prefill(Prefill(tokens=n, context=n)) for n in (2048, 4096))
    assert 2 * one - two == pytest.approx(CONSTANTS.kernel_tuning, abs=2 * MIB)


def test_phi_moe_picks_its_kernels_in_the_first_layer() -> None:
    """Where neither a residual nor a sum is alive yet: 129 MiB over for 8,192 tokens."""
    model = cut("phi-3.5-moe", 2)
    work = Activations(model, Settings(), CONSTANTS)
    paid = work.prefill(Prefill(tokens=8192, context=8192)) / MIB
    assert 1180.6 <= paid <= 1180.6 + 2 * 64 + 3
    assert work.further_pool() == CONSTANTS.page


@pytest.mark.parametrize(
    ("name", "tp", "mib"),
    [
        ("phi-3.5-moe", 1, 10_421.8), ("phi-3.5-moe", 2, 5461.8),
        ("deepseek-moe-16b", 1, 4324.0), ("deepseek-moe-16b", 2, 2562.4),
    ],
)  # fmt: skip
def test_weights_of_each_rank_are_the_engines(name: str, tp: int, mib: float) -> None:
    found = sum(weight_classes(cut(name, 4), tp).values()) / MIB
    assert found == pytest.approx(mib, abs=0.05)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_layer_s_experts_are_laid_out_anew_on_each_rank(tp: int) -> None:
    model = resolve_model("glm-4.5-air")
    assert largest_loaded(model, tp) == 128 * 3 * 4096 * 1408 * 2 // tp


@pytest.mark.parametrize("tp", [1, 8])
def test_gpt_oss_sends_a_layer_s_experts_as_one(tp: int) -> None:
    model = resolve_model("gpt-oss-20b-bf16")
    whole = 32 * 2880 * 2 * 2880 * 2
    assert largest_loaded(model, tp) == max(whole, whole * 3 // 2 // tp)


def test_what_torch_does_not_compile_is_three_products_more() -> None:
    model = cut("gpt-oss-20b-bf16", 2)
    work = Activations(model, Settings(), CONSTANTS)
    fused = Activations(
        replace(model, text=replace(model.text, architecture="MixtralForCausalLM")),
        Settings(),
        CONSTANTS,
    )
    assert work.decode(100) - fused.decode(100) == 100 * 3 * 4 * 2880 * 2


def test_partial_outputs_of_many_heads_outweigh_experts() -> None:
    """71.2 MiB of 374 rows were seen in the graphs of GLM-4.5-Air."""
    work = Activations(resolve_model("glm-4.5-air"), Settings(), CONSTANTS)
    partial = 374 * 96 * 4 * 130 * 4
    assert partial / MIB == pytest.approx(71.2, abs=0.1)
    assert work.decode(374) > partial + 374 * (5 * 4096 + 4 * 96 * 128) / 2 * 2


@pytest.mark.parametrize(("layers", "seen"), [(4, 5_130_315_992), (6, 6_490_336_488)])
def test_qwen3_vl_keeps_the_dense_model_that_it_made_first(layers: int, seen: int) -> None:
    """Of each of two ranks, on pretend RTX 3090s; one rank alone frees it."""
    model = cut("qwen3-vl-30b-a3b", layers)
    assert seen <= sum(weight_classes(model, 2).values()) <= seen + MIB
    assert sum(weight_classes(model, 1).values()) == 2 * parameters(model.text, model.vision)


@pytest.mark.parametrize(("tp", "channels"), [(1, 768), (2, 384), (4, 256), (8, 128)])
def test_experts_of_fp8_are_dealt_in_whole_blocks(tp: int, channels: int) -> None:
    """768 channels are six blocks of 128: of four ranks the first two have two of them."""
    model = resolve_model("qwen3-30b-a3b")
    packed = replace(model, quantization=Quantization(method="fp8", bits=8, group_size=128))
    whole, held = weight_classes(packed, 1)["mlp"], weight_classes(packed, tp)["mlp"]
    assert held == pytest.approx(whole * channels / 768, rel=1e-6)
    assert Activations(packed, Settings(tp=tp), CONSTANTS).expert == channels
    assert expert_channels(model, tp) == 768 // tp
