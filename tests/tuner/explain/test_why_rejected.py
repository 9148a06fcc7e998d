"""Each candidate that fits says what it would have done, and what holds it back."""

from __future__ import annotations

import turbofit


def reasons(model: str, on: str, **asked: object) -> list[tuple[int, int, str]]:
    plan = turbofit.plan(model, on=on, **asked)
    return [(c.tp, c.replicas, c.why_not) for c in plan.considered if c.fits]


def test_links_are_named_where_a_step_waits_for_them() -> None:
    said = reasons("llava-1.5-7b", "4xrtx3090")
    four = next(why for tp, replicas, why in said if (tp, replicas) == (4, 1) and "step" in why)
    assert "requests/s, not" in four
    assert "% of a step waits for links (through host memory, no peer access)" in four


def test_idle_cards_and_small_caches_are_named() -> None:
    said = {(tp, n): why for tp, n, why in reasons("qwen2.5-7b", "2xrtx3090")}
    assert said[1, 1].endswith((": GPUs stay idle", "requests at once, not 190"))
    short = [why for *_, why in reasons("internvl2-8b", "2xrtx3090:free=18GiB")]
    assert any("its cache holds a context of" in why for why in short)


def test_goals_speak_in_their_own_figures() -> None:
    latency = [why for *_, why in reasons("qwen2.5-7b", "2xrtx4090", goal="latency") if why]
    assert any(why.startswith("an answer in ") for why in latency)
    context = [why for *_, why in reasons("qwen2.5-7b", "2xrtx4090", goal="context") if why]
    assert any("KV tokens for one request, not" in why for why in context)
    assert all(reasons("qwen2.5-7b", "2xrtx4090")[i][2] for i in range(1, 5))
