"""What Intern-S1-Pro takes beyond other models with experts, in the PyTorch engine's account."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.memory.pytorch.test_account import CONSTANTS
from turbofit.core.plan import Settings
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.model.presets import preset_model


@pytest.mark.parametrize(("tp", "heads"), [(1, 4), (2, 2), (8, 1)])
def test_each_kv_head_has_rotary_tables(tp: int, heads: int) -> None:
    model, forward = preset_model("intern-s1-pro"), Prefill(tokens=8192, context=8192)
    plain = replace(model, text=replace(model.text, fourier=0))
    more, less = (
        Activations(one, Settings(tp=tp), CONSTANTS).prefill(forward) for one in (model, plain)
    )
    assert more - less == 8192 * 2 * (heads - 1) * 128 * 2
