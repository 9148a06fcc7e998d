"""The sentence that says why a candidate of a plan lost."""

from __future__ import annotations

import turbofit


def why_not(model: str, on: str, **asked: object) -> dict[tuple[int, int], str]:
    """Why each other shape lost, by its degree and copies; the chosen one has no reason."""
    chosen, *others = [row for row in turbofit.plan(model, on=on, **asked).considered if row.fits]
    assert chosen.why_not == ""
    assert all(row.why_not for row in others)
    return {(row.tp, row.replicas): row.why_not for row in others}


def test_a_shape_that_loses_says_by_what() -> None:
    four = why_not("internvl2-8b", "4xrtx3090")[4, 1]
    assert "requests/s, not" in four
    assert "% of a step waits for links (through host memory, no peer access)" in four
    # The PyTorch engine's images: no figure of theirs is told, and no share of a step.
    assert why_not("llava-1.5-7b", "4xrtx3090")[4, 1] == "slower by a forecast that is not printed"
    short = why_not("internvl2-8b", "2xrtx3090:free=18GiB")
    assert any("its cache holds a context of" in why for why in short.values())
    latency = why_not("qwen2.5-7b", "2xrtx4090", goal="latency")
    assert any(why.startswith("an answer in ") for why in latency.values())
    context = why_not("qwen2.5-7b", "2xrtx4090", goal="context")
    assert any("KV tokens for one request, not" in why for why in context.values())


def test_a_cache_that_lmdeploy_does_not_divide_out_names_what_is_missing() -> None:
    asked = {"engine": "pytorch", "least": True, "max_prefill_token_num": 4096}
    lacking, more = (
        turbofit.plan("internvl2-1b", on=f"1xrtx3090:free={mib}MiB", max_dynamic_patch=7, **asked)
        for mib in (3072, 3072 + 298)
    )
    assert "holds 0 KV blocks of the 16 that LMDeploy asks for (297 MiB more)" in lacking.verdict
    assert "of the 16 that LMDeploy asks for" not in more.verdict
