"""What the answers of a load come to: times by share, and first tokens by turn."""

from __future__ import annotations

from array import array

import pytest

from turbofit.measure.load.client import Answer
from turbofit.measure.load.result import Window, spread, turns_of


def answer(turn: int, first: float, prompt: int, cached: int | None) -> Answer:
    one = Answer(0.0, ended=9.0, turn=turn, prompt_tokens=prompt, cached_tokens=cached)
    one.pieces = array("d", [first, 9.0])
    return one


def test_turns_are_told_apart_with_what_the_cache_had_of_their_prompts() -> None:
    answers = [answer(2, 0.1, 300, 290), answer(1, 1.0, 100, 0), answer(2, 0.3, 100, 70)]
    first, second = turns_of(answers)
    assert (first.turn, first.answered, first.ttft_p50, first.cached) == (1, 1, 1.0, 0.0)
    assert (second.turn, second.answered) == (2, 2)
    assert (second.ttft_p50, second.ttft_p90) == (0.1, 0.3)
    assert second.cached == pytest.approx(360 / 400)
    assert second.cached_words == "90%"
    (silent,) = turns_of([answer(1, 1.0, 100, None)])
    assert (silent.cached, silent.cached_words) == (None, "unknown")


def test_an_answer_counts_by_its_share_of_the_window() -> None:
    window, one = Window(3.0, 6.0), answer(1, 4.0, 100, 0)
    assert window.share(one) == pytest.approx(3 / 9)
    assert spread([3.0, None, 1.0]).p50 == 1.0
