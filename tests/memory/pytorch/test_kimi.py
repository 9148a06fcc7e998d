"""What Kimi-K2.5 takes beside DeepSeek-V3, in the PyTorch engine's account.

Bytes of weights are of torch's allocator on pretend A100s, of three layers with 48 experts.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import MIB
from turbofit.memory.pytorch.account import tp_problem
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.weights import weight_classes
from turbofit.model.presets import preset_model


def smaller(layers: int, experts: int, *, packed: bool = True) -> Model:
    model = preset_model("kimi-k2.5")
    moe = model.text.moe
    assert moe is not None
    moe = replace(moe, layers=layers - 1, experts=experts)
    quantization = model.quantization if packed else None
    return replace(
        model, text=replace(model.text, layers=layers, moe=moe), quantization=quantization
    )


@pytest.mark.parametrize(
    ("model", "tp", "mib"),
    [
        (smaller(3, 48), 1, 9_150.7), (smaller(3, 48), 2, 6_188.7),
        (smaller(2, 384), 1, 15_681.7), (smaller(2, 48, packed=False), 1, 10_637.1),
    ],
)  # fmt: skip
def test_weights_are_the_engines(model: Model, tp: int, mib: float) -> None:
    assert sum(weight_classes(model, tp).values()) / MIB == pytest.approx(mib, abs=0.1)


def test_head_and_tower_are_whole_on_every_rank() -> None:
    one, eight = (weight_classes(preset_model("kimi-k2.5"), tp) for tp in (1, 8))
    assert "vision" not in one
    for name in ("lm_head", "vision.whole", "norms"):
        assert one[name] == eight[name]
    assert one["embedding"] == 8 * eight["embedding"]
    assert one["mlp"] == 8 * eight["mlp"]


@pytest.mark.parametrize(("tp", "match"), [(8, None), (16, None), (3, "heads"), (128, "heads")])
def test_ranks_keep_whole_groups(tp: int, match: str | None) -> None:
    problem = tp_problem(preset_model("kimi-k2.5"), tp)
    assert (problem is None) if match is None else match in (problem or "")
    moe = preset_model("kimi-k2.5").text.moe
    assert moe is not None
    model = preset_model("kimi-k2.5")
    narrow = replace(model, text=replace(model.text, moe=replace(moe, intermediate=96)))
    assert "groups of 32" in (tp_problem(narrow, 2) or "")
    assert tp_problem(replace(narrow, quantization=None), 2) is None


def test_the_first_image_leaves_tables() -> None:
    model = preset_model("kimi-k2.5")
    work = Activations(model, Settings(tp=8), CONSTANTS)
    assert work.tables() == 72 * MIB
    assert Activations(preset_model("deepseek-v3"), Settings(tp=8), CONSTANTS).tables() == 0
    text, image = (
        work.prefill(Prefill(tokens=8192, context=8192, units=units)) for units in (0, 4)
    )
    assert image - text > 72 * MIB


def test_experts_in_four_bits_are_not_tuned() -> None:
    forward = Prefill(tokens=64, context=64)
    packed, plain = (
        Activations(one, Settings(), CONSTANTS).prefill(forward)
        for one in (preset_model("kimi-k2.5"), smaller(61, 384, packed=False))
    )
    assert plain - packed > 200 * MIB
