"""What clients of the fallback engine write, and what of it is refused."""

from __future__ import annotations

import pytest

from turbofit.launch.fallback.errors import RequestRefused, of_client
from turbofit.launch.fallback.inner_body import CHAT, inner_body

_MESSAGES = '"messages": [{"role": "user", "content": "hi"}]'


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (f'"logit_bias": {{"5": {10**400}}}', "logit_bias must be"),
        ('"logit_bias": {"five": 1}', "logit_bias must be"),
        ('"max_tokens": 0', "max_tokens must be at least 1"),
        ('"max_tokens": true', "max_tokens must be a number"),
        ('"top_p": 1.5', "top_p must lie between"),
        ('"temperature": -1', "temperature must not be negative"),
        ('"n": 2', "n is 1 at most"),
    ],
)
def test_numbers_that_cannot_be_are_the_clients(given: str, said: str) -> None:
    with pytest.raises(RequestRefused, match=said) as refused:
        inner_body(CHAT, f"{{{_MESSAGES}, {given}}}".encode(), "m", 100, 1)
    assert refused.value.status == 400


def test_a_number_beyond_all_integers_is_the_clients() -> None:
    with pytest.raises(OverflowError) as exc:
        int(float("inf"))
    assert of_client(exc.value)
    assert not of_client(RuntimeError())
