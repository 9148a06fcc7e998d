"""Engine deaths by client, by a clock of the test."""

from __future__ import annotations

import pytest

from tests.gateway.quarantine.test_suspects import Clock
from turbofit.gateway.quarantine.accounts import BUDGET, BUDGET_SECONDS, Accounts, accounts_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounts(clock: Clock) -> Accounts:
    return Accounts(clock)


def deaths(accounts: Accounts, count: int, *names: str, proved: bool = True, **facts) -> None:
    for _ in range(count):
        accounts.charge(object(), names, proved=proved, **facts)


def test_a_client_is_a_key_at_an_address_and_the_key_everywhere() -> None:
    assert accounts_of("k", "a") == ("k a", "k")
    assert accounts_of("", "a") == ("a",)


def test_the_budget_is_spent_and_comes_back_after_an_hour(accounts, clock) -> None:
    deaths(accounts, BUDGET - 1, "a")
    assert accounts.seconds_refused(("a",)) == 0
    clock.now += 100
    deaths(accounts, 1, "a")
    assert accounts.seconds_refused(("a",)) == BUDGET_SECONDS - 100
    assert (accounts.seconds_refused(("b",)), accounts.refused) == (0, 1)
    clock.now += BUDGET_SECONDS - 100
    assert (accounts.seconds_refused(("a",)), accounts.refused) == (0, 0)


def test_a_key_has_twice_the_budget_over_all_addresses(accounts) -> None:
    for address in ("x", "y"):
        deaths(accounts, BUDGET - 1, *accounts_of("key", address))
    assert accounts.seconds_refused(accounts_of("key", "z")) == 0
    deaths(accounts, 2, *accounts_of("key", "w"))
    assert accounts.seconds_refused(accounts_of("key", "z")) > 0
    assert accounts.seconds_refused(accounts_of("other", "x")) == 0


def test_one_death_counts_once_and_a_proof_replaces_a_doubt(accounts) -> None:
    death = object()
    for proved in (False, False, True, True, False):
        accounts.charge(death, ("a",), proved=proved)
    deaths(accounts, BUDGET - 2, "a")
    assert accounts.seconds_refused(("a",)) == 0
    deaths(accounts, 1, "a")
    assert accounts.seconds_refused(("a",)) > 0


def test_what_was_answered_later_is_paid_back(accounts) -> None:
    death = object()
    accounts.charge(death, ("a",), proved=False)
    deaths(accounts, BUDGET - 1, "a")
    assert accounts.seconds_refused(("a",)) > 0
    accounts.refund(death, ("a",))
    assert accounts.seconds_refused(("a",)) == 0
    accounts.charge(death, ("a",), proved=True)
    accounts.refund(death, ("a",))
    assert accounts.seconds_refused(("a",)) > 0
    accounts.refund(death, ("a",), proved=True)
    assert accounts.seconds_refused(("a",)) == 0


def test_a_variation_that_is_never_sent_again_counts_too(accounts) -> None:
    """On a server of one engine nothing is tried again, and nothing is ever proved."""
    deaths(accounts, BUDGET, "bad", proved=False)
    assert accounts.seconds_refused(("bad",)) > 0


def test_answers_make_up_for_doubts_but_not_for_proofs(accounts) -> None:
    deaths(accounts, BUDGET, "good", proved=False)
    deaths(accounts, BUDGET, "bad")
    for name in ("good", "bad"):
        for _ in range(8):
            accounts.answered((name,))
    assert accounts.seconds_refused(("good",)) == 0
    assert accounts.seconds_refused(("bad",)) > 0


def test_a_death_in_the_middle_of_an_answer_is_half_a_doubt(accounts) -> None:
    deaths(accounts, 2 * BUDGET - 1, "a", proved=False, begun=True)
    assert accounts.seconds_refused(("a",)) == 0
    deaths(accounts, 1, "a", proved=False, begun=True)
    assert accounts.seconds_refused(("a",)) > 0


def test_a_busy_address_may_cost_more(accounts) -> None:
    """Who stands behind it are many: a thousand answers allow one death more."""
    for _ in range(1000):
        accounts.answered(("backend",))
    deaths(accounts, BUDGET, "backend")
    assert accounts.seconds_refused(("backend",)) == 0
    deaths(accounts, 1, "backend")
    assert accounts.seconds_refused(("backend",)) > 0


def test_answers_are_forgotten(accounts, clock) -> None:
    for _ in range(1000):
        accounts.answered(("a",))
    clock.now += 2 * BUDGET_SECONDS
    deaths(accounts, BUDGET, "a")
    assert accounts.seconds_refused(("a",)) > 0


def test_proofs_are_kept_and_doubts_are_not(accounts, clock) -> None:
    deaths(accounts, 2, "a")
    deaths(accounts, 2, "b", proved=False)
    state = accounts.state()
    assert state == {"a": (clock(), clock())}
    again = Accounts(clock)
    again.merge(state)
    again.merge(state)
    deaths(again, BUDGET - 2, "a")
    assert again.seconds_refused(("a",)) > 0


def test_accounts_are_bounded(accounts) -> None:
    for number in range(17_000):
        accounts.answered((f"{number}",))
    assert len(accounts._accounts) == 16_384
