"""How many connections there may be, which one makes room, and who may ask."""

from __future__ import annotations

import hmac

import pytest

from turbofit.core.errors import UsageError
from turbofit.gateway.config import ConnectionLimits
from turbofit.gateway.http.connections import Connections, Keys, Networks, Origins, address_of
from turbofit.gateway.http.refusals import Refusal


class One:
    closed = False

    def make_room(self) -> None:
        self.closed = True


def make(most: int = 4, of_one: int = 2, proxies=()):
    limits = ConnectionLimits(connections=most, connections_per_address=of_one)
    counted: list[tuple[str, str]] = []
    return Connections(limits, Networks(proxies), lambda *words: counted.append(words)), counted


def test_the_one_that_waited_longest_makes_room_and_one_at_work_never() -> None:
    all_, counted = make(of_one=99)
    ones = [One() for _ in range(6)]
    for number in range(4):
        assert all_.opened(ones[number], f"10.0.0.{number}") is None
    all_.works(ones[0])
    assert all_.opened(ones[4], "10.0.0.9") is None
    assert [conn.closed for conn in ones] == [False, True, False, False, False, False]
    assert counted == [("connections_closed_total", "reason=made_room")]
    assert len(all_) == 4
    all_.works(ones[2])
    all_.waits(ones[2])  # it waits again, and is the youngest of those that do
    assert all_.opened(ones[5], "10.0.0.9") is None
    assert [conn.closed for conn in ones] == [False, True, False, True, False, False]


def test_where_all_are_at_work_a_new_one_is_refused_and_counted_until_it_ends() -> None:
    all_, _ = make(most=2, of_one=99)
    first, second, third, fourth = (One() for _ in range(4))
    for conn in (first, second):
        assert all_.opened(conn, "10.0.0.1") is None
        all_.works(conn)
    refusal = all_.opened(third, "10.0.0.2")
    assert refusal is not None
    assert (refusal.status, refusal.retry_after) == (503, 2)
    assert "all 2 connections" in refusal.message
    assert len(all_) == 3
    # The refused one waits for its end: it is the next to go.
    refusal = all_.opened(fourth, "10.0.0.3")
    assert third.closed
    all_.closed(fourth)
    all_.closed(fourth)
    all_.closed(first)
    assert len(all_) == 1
    assert all_.opened(One(), "10.0.0.3") is None


def test_an_address_makes_room_for_itself_only() -> None:
    all_, _ = make()
    other, ones = One(), [One() for _ in range(4)]
    assert all_.opened(other, "10.0.0.1") is None
    for conn in ones[:3]:
        assert all_.opened(conn, "10.0.0.2") is None
    assert (other.closed, ones[0].closed, len(all_)) == (False, True, 3)
    for conn in ones[1:3]:
        all_.works(conn)
    refusal = all_.opened(ones[3], "10.0.0.2")
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (429, "too_many_connections")
    assert "2 connections of this address, the limit is 2" in refusal.message
    assert not other.closed


def test_a_trusted_proxy_has_the_connections_of_many() -> None:
    all_, _ = make(proxies=("10.0.0.0/24",))
    ones = [One() for _ in range(5)]
    assert [all_.opened(conn, "10.0.0.7") for conn in ones] == [None] * 5
    assert [conn.closed for conn in ones] == [True, False, False, False, False]  # 4 in all


def test_an_ipv6_client_is_its_64() -> None:
    assert address_of("10.0.0.1") == "10.0.0.1"
    assert address_of("2001:db8::1") == address_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert address_of("2001:db8:0:1::1") != "2001:db8::/64"
    assert address_of("::ffff:10.0.0.1") == "10.0.0.1"
    assert address_of("not:an:address") == "not:an:address"
    all_, _ = make(of_one=1)
    first = One()
    assert all_.opened(first, "2001:db8::1") is None
    assert all_.opened(One(), "2001:db8::2") is None
    assert first.closed


def test_what_the_system_gives_lowers_the_number() -> None:
    all_, _ = make(most=100, of_one=99)
    all_.lower(1)
    all_.lower(50)
    first = One()
    assert all_.opened(first, "10.0.0.1") is None
    assert all_.opened(One(), "10.0.0.2") is None
    assert first.closed


@pytest.mark.parametrize("word", ["proxy.example.com", "10.0.0.1/8", "", "10.0.0.0/33"])
def test_what_is_no_network_is_said(word) -> None:
    with pytest.raises(UsageError, match="is no address or network"):
        Networks([word])


def test_networks() -> None:
    assert "10.1.2.3" in Networks(["10.0.0.0/8", "::1"])
    assert "::1" in Networks(["::1"])
    assert "127.0.0.1" not in Networks(["::1"])
    assert "nonsense" not in Networks(["::1"])
    assert "127.0.0.1" not in Networks([])


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
