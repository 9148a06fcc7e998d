from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.launch.engine.worst_requests import ProbeRequest, longest_request


@pytest.mark.parametrize("session", [64, 256, 4096])
@pytest.mark.parametrize("each", [1, 2])
def test_every_prompt_of_it_fits_the_session(session: int, each: int) -> None:
    """A server that counts one or two tokens a word, five around them, and refuses what is more."""
    plan = plausible_plan()
    plan = replace(plan, settings=replace(plan.settings, session_len=session))
    questions: list[int] = []

    def count(question: ProbeRequest) -> int:
        tokens = 5 + each * question.body["prompt"].count(" a")
        questions.append(tokens)
        assert tokens + question.body["max_tokens"] <= session
        return tokens

    longest = longest_request(plan, "m", None, 0, count)
    assert longest is not None
    count(longest)
    assert questions[-1] >= 0.9 * session
