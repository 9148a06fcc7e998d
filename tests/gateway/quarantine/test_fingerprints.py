"""Fingerprints: of all that the engine is given, by a key, and nothing in clear."""

from __future__ import annotations

import pytest

from turbofit.gateway.quarantine.fingerprints import KEY_BYTES, Fingerprints

CHAT = "/v1/chat/completions"
MADE = Fingerprints(b"k" * KEY_BYTES)
BODY = b'{"model":"m","messages":[{"role":"user","content":"secret"}],"seed":1}'


def test_the_same_request_has_the_same_one_and_another_key_gives_another() -> None:
    assert MADE.of(CHAT, BODY) == Fingerprints(b"k" * KEY_BYTES).of(CHAT, bytes(bytearray(BODY)))
    assert MADE.of(CHAT, BODY) != Fingerprints(b"l" * KEY_BYTES).of(CHAT, BODY)
    assert (len(MADE.of(CHAT, BODY)), len(MADE.sketch(CHAT, BODY))) == (24, 12)
    assert "secret" not in MADE.of(CHAT, BODY) + MADE.sketch(CHAT, BODY)


@pytest.mark.parametrize(
    "other",
    [BODY.replace(b'"m"', b'"n"'), BODY.replace(b"secret", b"Secret"), BODY.replace(b"1}", b"2}")],
)
def test_the_model_the_prompt_and_each_parameter_count(other) -> None:
    assert MADE.of(CHAT, other) != MADE.of(CHAT, BODY)
    assert MADE.sketch(CHAT, other) != MADE.sketch(CHAT, BODY)


def test_the_route_counts() -> None:
    assert MADE.of("/v1/completions", BODY) != MADE.of(CHAT, BODY)
    assert MADE.sketch("/v1/completions", BODY) != MADE.sketch(CHAT, BODY)


def test_a_sketch_sees_the_length_and_the_ends_and_a_fingerprint_everything() -> None:
    image = bytes(range(256)) * 40
    other = image[:5000] + b"\0" + image[5001:]
    assert len(image) == len(other)
    assert MADE.sketch(CHAT, image) == MADE.sketch(CHAT, other)
    assert MADE.of(CHAT, image) != MADE.of(CHAT, other)
    assert MADE.sketch(CHAT, image) != MADE.sketch(CHAT, image + b" ")
