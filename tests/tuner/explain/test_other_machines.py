"""Machines that might be have the links of the one that is."""

from __future__ import annotations

import pytest

import turbofit


@pytest.mark.parametrize(
    ("on", "more", "model"),
    [
        ("1xh100", "2xh100", "llama-3.1-70b"),
        ("1xh100,nvlink=none", "2xh100", "llama-3.1-70b"),  # a card alone says nothing of links
        ("1xh100-pcie", "2xh100-pcie", "llama-3.1-70b"),
        ("2xa100-40g", "4xa100-40g", "mixtral-8x7b"),
        ("2xa100-40g,nvlink=none", "4xa100-40g,nvlink=none", "mixtral-8x7b"),
        ("2xrtx3090,nvlink=0-1", "8xrtx3090,nvlink=0-1+2-3+4-5+6-7", "llama-3.1-70b"),
    ],
)
def test_more_of_a_card_promise_what_a_plan_on_them_does(on: str, more: str, model: str) -> None:
    """They had no links at all: NCCL took 870 MiB less of an H100 than it does over NVLink."""
    plan = turbofit.plan(model, on=more)
    change = f"{more[0]} x {plan.machine.gpus[0].name}"
    effects = {one.change: one.effect for one in turbofit.plan(model, on=on).remedies}
    assert effects[change].startswith(f"fits: {plan.kv.tokens:,} KV tokens")
