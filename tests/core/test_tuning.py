"""A trial's settings in words."""

from __future__ import annotations

from typing import Any

import pytest

from turbofit.core.tuning import TrialForecast, TrialRecord


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "prefill 1024"),
        ({"speculative_num_draft_tokens": 3}, "prefill 1024, 3 draft tokens"),
        ({"speculative_num_draft_tokens": None}, "prefill 1024, 0 draft tokens"),
    ],
)
def test_the_tokens_of_a_draft(options: dict[str, Any], words: str) -> None:
    trial = TrialRecord(
        number=1, options=options, engine="pytorch", tp=1, replicas=1, max_batch_size=8,
        max_prefill_token_num=1024, quant_policy=0, enable_prefix_caching=False, kv_tokens=1,
        forecast=TrialForecast(requests_per_second=None, ttft=None, tpot=None), outcome="measured",
    )  # fmt: skip
    assert trial.settings == f"pytorch, tp 1 x 1, batch 8, {words}"
