"""Options that LMDeploy takes, or seems to take, and that cannot be meant."""

from __future__ import annotations

import pytest

import turbofit
from turbofit.core.errors import UsageError


@pytest.mark.parametrize(
    ("model", "on", "asked", "message"),
    [
        ("internvl2-8b", "1xrtx3090", {"cache_block_seq_len": 48}, "needs a multiple of 32"),
        ("internvl2-8b", "1xrtx3090", {"cache_block_seq_len": 16}, "needs a multiple of 32"),
        ("internvl2-2b", "1xt4", {"cache_block_seq_len": 96}, "needs a multiple of 64"),
        ("internvl2-8b-awq", "1xrtx3090", {"model_format": "hf"}, "are stored in awq"),
        ("internvl2-8b-awq", "1xrtx3090", {"model_format": "gptq"}, "are stored in awq"),
        ("internvl2-8b", "1xrtx3090", {"model_format": "awq"}, "stored in bfloat16, which is hf"),
        ("internvl2-8b", "1xrtx3090", {"model_format": "fp8"}, "stored in bfloat16, which is hf"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    model: str, on: str, asked: dict[str, object], message: str
) -> None:
    for call in (turbofit.plan, turbofit.predict):
        with pytest.raises(UsageError, match=message):
            call(model, on=on, engine="turbomind", **asked)


@pytest.mark.parametrize(
    ("model", "on", "asked"),
    [
        ("internvl2-8b", "1xrtx3090", {"cache_block_seq_len": 96}),
        ("internvl2-2b", "1xt4", {"cache_block_seq_len": 128}),
        ("internvl2-8b-awq", "1xrtx3090", {"model_format": "awq"}),
        ("internvl2-8b", "1xrtx3090", {"model_format": "hf"}),
    ],
)
def test_what_can_is_kept(model: str, on: str, asked: dict[str, object]) -> None:
    plan = turbofit.plan(model, on=on, engine="turbomind", **asked)
    assert plan.fits
    assert all(getattr(plan.settings, name) == value for name, value in asked.items())
