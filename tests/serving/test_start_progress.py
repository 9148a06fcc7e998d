"""What is told of a start: how far it has come, and the weights on the GPUs."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
from msgspec.structs import replace

from tests.serving.test_start import start_of
from tests.support.plans import plausible_plan
from turbofit.core.process.progress import Step, listened, tell
from turbofit.serving import start_progress
from turbofit.serving.start_progress import StartProgress, with_real_caches


def test_what_is_told_at_the_opening_stays() -> None:
    """A tuning's load, which begins there."""
    one, heard = engine("check"), []
    start = start_of([one], on_open=lambda _: tell(Step("the load")))
    with listened(heard.append):
        start._tick()
        one.state = one.tracker.phase = "ready"
        start._open(["http://127.0.0.1:1"])
        start._tick()
    assert heard == [Step("answering worst-case requests"), None, Step("the load")]


PAIR = plausible_plan(gpus=2, tp=2)

WEIGHTS, CONTEXT = (
    [sum(term.bytes for term in one.terms if term.phase == phase) for one in PAIR.ledgers]
    for phase in ("weights", "context")
)


def engine(phase: str, group: int = 0, warming: int | None = None) -> Any:
    state = "ready" if phase == "ready" else "starting"
    tracker = MagicMock(phase=phase, warming=warming, figures=[])
    tracker.cached_tokens.return_value = None
    launch = MagicMock(tuning=None)
    return MagicMock(
        state=state, tracker=tracker, group=group, pretended=None, launch=launch
    )  # fmt: skip


def test_weights_are_what_came_onto_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = {0: 7 << 20, 1: 0}, [0.0]
    used: dict[int, int] = {}
    looks: list[object] = []
    monkeypatch.setattr(start_progress, "used_now", lambda plan: looks.append(plan) or dict(used))
    progress, heard = StartProgress(PAIR, before, clock=lambda: now[-1]), []
    progress.look([engine("weights")])
    assert looks == []  # nobody looks at GPUs for nobody
    with listened(heard.append):
        progress.look([engine("weights")])
        used |= {0: before[0] + CONTEXT[0] + 1000, 1: CONTEXT[1] - 5}
        progress.look([engine("weights")])  # not a second later: nobody looks
        now.append(1.0)
        progress.look([engine("weights")])
        used[0] += WEIGHTS[0] + 1  # more than the plan's is something else
        now.append(2.0)
        progress.look([engine("weights")])
    total = sum(WEIGHTS)
    assert heard == [
        Step("loading weights", done, total, "bytes") for done in (0, 0, 1000, WEIGHTS[0])
    ]


def test_the_gateway_counts_on_no_more_cache_than_the_engines_say_they_have() -> None:
    plan = plausible_plan()
    more = plan.engines[0].kv.tokens + 64
    assert with_real_caches(plan, {0: more}) == with_real_caches(plan, {0: None}) == plan
    assert with_real_caches(plan, {0: 4096, 1: 8192}).engines[0].kv.tokens == 4096
    (part,) = plan.engines
    roomy = replace(part, kv=replace(part.kv, tokens=2 * part.kv.tokens))
    told = with_real_caches(replace(plan, engines=(part, roomy)), {0: None, 1: more})
    assert [one.kv.tokens for one in told.engines] == [plan.engines[0].kv.tokens, more]
    assert told.engines[0].kv.tokens == plan.engines[0].kv.tokens
