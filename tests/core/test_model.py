"""The layers that a quantised checkpoint exempts."""

from __future__ import annotations

import pytest

from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization

INPUTS = "linear_attn.in_proj_qkv"


@pytest.mark.parametrize(
    ("name", "exempted"),
    [
        ("linear_attn", True),
        ("model.language_model.layers.4.linear_attn", True),
        ("model.layers.4.linear_attn.in_proj_qkv", True),
        ("layers.4.", True),
        ("model.language_model.layers.3.linear_attn.in_proj_qkv", False),
        ("model.layers.44", False),
        ("mtp.layers.4.linear_attn", False),
        ("re:.*linear_attn.*", True),
        ("re:.*linear_attn.in_proj_[ab]$", False),
        ("model.language_model.layers.4.linear_attn.in_proj_a", False),
        ("model.language_model.layers.4.linear_attn.in_proj", False),
        ("model.visual", False),
        ("lm_head", False),
        ("re:(", False),
        ("", False),
    ],
)
def test_a_name_or_an_expression_exempts_a_layer(name: str, exempted: bool) -> None:
    packing = Quantization(method="fp8", bits=8, group_size=128, unconverted=("mtp", name))
    assert packing.exempts(INPUTS, 4) is exempted


@pytest.mark.parametrize("expression", ["(([a-z._0-9])+)+#", ".*.*.*.*.*#", "(a|b){9}"])
def test_an_expression_that_may_take_for_ever_is_refused(expression: str) -> None:
    packing = Quantization(method="awq", bits=4, group_size=128, unconverted=(f"re:{expression}",))
    with pytest.raises(UsageError, match="for ever"):
        packing.exempts(INPUTS, 4)
