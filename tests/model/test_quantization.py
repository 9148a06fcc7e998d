"""Which layers a quantised checkpoint's config exempts."""

from __future__ import annotations

import pytest

from turbofit.core.model import Quantization
from turbofit.model.quantization import exempts

INPUTS = "linear_attn.in_proj_qkv"


@pytest.mark.parametrize(
    ("name", "exempted"),
    [
        ("linear_attn", True),
        ("model.language_model.layers.0.linear_attn", True),
        ("model.language_model.layers.3.linear_attn.in_proj_qkv", True),
        ("re:.*linear_attn.*", True),
        ("re:.*linear_attn.in_proj_[ab]$", False),
        ("model.language_model.layers.0.linear_attn.in_proj_a", False),
        ("model.visual", False),
        ("lm_head", False),
        ("re:(", False),
        ("", False),
    ],
)
def test_a_name_or_an_expression_exempts_a_layer(name: str, exempted: bool) -> None:
    packing = Quantization(method="fp8", bits=8, group_size=128, unconverted=("mtp", name))
    assert exempts(packing, INPUTS) is exempted
