from __future__ import annotations

import hmac

import pytest

from turbofit.gateway.http.guard import Keys, Origins
from turbofit.gateway.http.refusals import Refusal

PAGE = b"https://chat.example"


@pytest.mark.parametrize("given", [b"first", b"second", b"neither"])
def test_the_time_of_an_answer_tells_nothing_of_a_key(
    given: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key's hash is compared in constant time, also after one was equal."""
    compared = []

    def compare(given_key: bytes, other: bytes) -> bool:
        compared.append(other)
        return given_key == other

    keys = Keys(("first", "second"))
    monkeypatch.setattr(hmac, "compare_digest", compare)
    if given == b"neither":
        with pytest.raises(Refusal):
            keys.check({b"x-api-key": given})
    else:
        assert keys.check({b"x-api-key": given})[0]
    assert len(set(compared)) == 2
    assert not {b"first", b"second"} & {*compared}


def test_a_page_that_is_closed_out_learns_the_option() -> None:
    with pytest.raises(Refusal) as caught:
        Origins().check({b"origin": PAGE})
    assert "--allow-origins https://chat.example" in caught.value.message
    with pytest.raises(Refusal) as caught:
        Origins().check({b"origin": b"https://" + b"a" * 10_000})
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("requested_header", "echo"),
    [
        (b"content-type,x-stainless-os", b"content-type,x-stainless-os"),
        (b"Content-Type, X-Stainless-Lang", b"Content-Type, X-Stainless-Lang"),
        (b"", None),
        (b"a\r\nset-cookie: b", None),
        (b"*", None),
        (b"x," * 2000 + b"x", None),
    ],
)
def test_a_page_may_send_the_headers_that_its_sdk_adds(
    requested_header: bytes, echo: bytes | None
) -> None:
    headers = {b"origin": PAGE, b"access-control-request-headers": requested_header}
    answer = dict(Origins((PAGE.decode(),)).preflight(headers))
    allowed = answer[b"access-control-allow-headers"]
    assert allowed == echo if echo else b"authorization, content-type" in allowed
