from __future__ import annotations

import pytest

from turbofit.gateway.http.guard import Origins
from turbofit.gateway.http.refusals import Refusal

PAGE = b"https://chat.example"


def test_a_page_that_is_closed_out_learns_the_option() -> None:
    with pytest.raises(Refusal) as caught:
        Origins().check({b"origin": PAGE})
    assert "--allow-origins https://chat.example" in caught.value.message
    with pytest.raises(Refusal) as caught:
        Origins().check({b"origin": b"https://" + b"a" * 10_000})
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("requested_header", "told"),
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
    requested_header: bytes, told: bytes | None
) -> None:
    headers = {b"origin": PAGE, b"access-control-request-headers": requested_header}
    answer = dict(Origins((PAGE.decode(),)).preflight(headers))
    allowed = answer[b"access-control-allow-headers"]
    assert allowed == told if told else b"authorization, content-type" in allowed
