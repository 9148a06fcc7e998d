"""What a plan for the PyTorch engine promises, beside what that engine took."""

from __future__ import annotations

from typing import Any

import pytest

import turbofit
from turbofit.core.plan import Plan
from turbofit.rehearse.torch.torch_planned import unanswered


@pytest.fixture(scope="module")
def plan() -> Plan:
    return turbofit.plan("qwen2-vl-2b", on="1xrtx3090", engine="pytorch")


def told(plan: Plan, *, short: int = 0, prompt: int = 444, **statuses: int) -> dict[str, Any]:
    """A rehearsal whose engine takes so many tokens less than the plan's longest request has."""
    case = {"name": "vision_forward", "prompt_tokens": prompt, "statuses": statuses}
    return {
        "cache": {"session_len": plan.kv.longest_request_tokens - short},
        "cases": [case],
    }


def test_all_that_is_promised_was_answered(plan: Plan) -> None:
    assert unanswered(plan, told(plan, finished=4)) is None
    assert unanswered(plan, told(plan, finished=4) | {"cache": None}) is None


def test_an_engine_that_takes_shorter_requests_breaks_the_promise(plan: Plan) -> None:
    death = unanswered(plan, told(plan, short=1, finished=4))
    assert death is not None
    assert death.where.startswith("the engine takes ")


def test_some_refused_requests_break_the_promise(plan: Plan) -> None:
    death = unanswered(plan, told(plan, finished=3, too_long=1))
    assert death is not None
    assert (death.phase, death.where.endswith(": 1 too_long")) == ("case vision_forward", True)
    beyond = plan.kv.longest_request_tokens + 1
    assert unanswered(plan, told(plan, prompt=beyond, finished=3, too_long=1)) is None
