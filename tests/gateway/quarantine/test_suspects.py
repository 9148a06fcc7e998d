"""Suspects, convictions and pardons, by a clock of the test."""

from __future__ import annotations

import pytest

from turbofit.core.struct import to_json
from turbofit.gateway.quarantine.accounts import BUDGET
from turbofit.gateway.quarantine.quarantined import (
    CONVICTED_SECONDS,
    EXPLAINED_SECONDS,
    SUSPECTED_SECONDS,
    Accused,
    EngineDeath,
)
from turbofit.gateway.quarantine.suspects import Suspects


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def suspects(clock: Clock) -> Suspects:
    return Suspects(clock)


def accused(name: str, *, alone: bool = False, begun: bool = False, who: str = "") -> Accused:
    accounts = (who or f"client of {name}",)
    return Accused(
        fingerprint=name, sketch=f"sketch {name}", accounts=accounts, alone=alone, begun=begun
    )


def convict(suspects: Suspects, name: str, *others: str, engines: tuple[int, int] = (0, 1)) -> None:
    """A death among others, and one alone."""
    first = EngineDeath(engines[0])
    for one in (name, *others):
        assert suspects.accuse(first, accused(one)) is None
    assert suspects.accuse(EngineDeath(engines[1]), accused(name, alone=True)) is not None


def test_who_was_in_flight_at_a_death_is_suspected_until_it_is_answered(suspects) -> None:
    assert not suspects.knows("sketch a")
    death = EngineDeath(0)
    suspects.accuse(death, accused("a"))
    suspects.accuse(death, accused("b", begun=True))
    assert suspects.knows("sketch a")
    assert suspects.suspicion("a").deaths == 1
    assert (suspects.suspicion("a").begun, suspects.suspicion("b").begun) == (False, True)
    assert suspects.number == (2, 0)
    assert suspects.acquit("a", ()) is True
    assert suspects.acquit("a", ()) is False
    assert suspects.suspicion("a") is None
    assert not suspects.knows("sketch a")
    assert suspects.suspicion("b") is not None


def test_an_equal_one_that_was_alone_counts_though_another_was_told_of_first(suspects) -> None:
    """One whose client left beside it was told of first, and nobody was convicted."""
    suspects.accuse(EngineDeath(0), accused("a"))
    second = EngineDeath(1)
    assert suspects.accuse(second, accused("a")) is None
    assert suspects.suspicion("a").deaths == 2
    conviction = suspects.accuse(second, accused("a", alone=True))
    assert conviction is not None
    assert conviction.engines == 2
    suspects.absolve(second)
    assert suspects.conviction("a") is None
    assert suspects.suspicion("a").deaths == 1


def test_equal_ones_at_a_first_death_convict_nobody(suspects) -> None:
    death = EngineDeath(0)
    for alone in (False, True, True):
        assert suspects.accuse(death, accused("a", alone=alone)) is None
    assert suspects.suspicion("a").deaths == 1


def test_several_copies_at_one_death_are_one(suspects) -> None:
    death = EngineDeath(0)
    suspects.accuse(death, accused("a"))
    assert suspects.accuse(death, accused("a", alone=True)) is None
    assert suspects.suspicion("a").deaths == 1


def test_a_second_death_alone_convicts_and_one_beside_others_does_not(suspects, clock) -> None:
    suspects.accuse(EngineDeath(0), accused("a", alone=True))
    assert suspects.conviction("a") is None  # it may have been chance
    suspects.accuse(EngineDeath(1), accused("a"))
    assert suspects.conviction("a") is None
    found = suspects.accuse(EngineDeath(2), accused("a", alone=True))
    assert (found.engines, found.since, found.until) == (3, clock(), clock() + CONVICTED_SECONDS)
    assert suspects.conviction("a") == found
    assert suspects.suspicion("a") is None
    assert suspects.knows("sketch a")


def test_suspicions_and_convictions_end(suspects, clock) -> None:
    convict(suspects, "a")
    suspects.accuse(EngineDeath(5), accused("b"))
    clock.now += SUSPECTED_SECONDS - 1
    assert suspects.suspicion("b") is not None
    clock.now += 1
    assert suspects.suspicion("b") is None
    clock.now += CONVICTED_SECONDS - SUSPECTED_SECONDS - 1
    assert suspects.conviction("a") is not None
    clock.now += 1
    assert suspects.conviction("a") is None
    assert not suspects.knows("sketch a")


def test_more_is_suspected_by_a_death_that_fewer_shared(suspects) -> None:
    crowd, pair = EngineDeath(0), EngineDeath(1)
    for number in range(10):
        suspects.accuse(crowd, accused(f"crowd {number}"))
    for name in ("one", "two"):
        suspects.accuse(pair, accused(name))
    suspects.accuse(pair, accused("crowd 3"))
    weights = {name: suspects.weight(name) for name in ("crowd 0", "one", "crowd 3")}
    assert weights == pytest.approx({"crowd 0": 0.1, "one": 1 / 3, "crowd 3": 0.1 + 1 / 3})


def test_a_conviction_explains_its_deaths_to_those_beside_it(suspects, clock) -> None:
    """They run alone once all the same, for ten minutes: another killing one may be among them."""
    convict(suspects, "a", "innocent", engines=(0, 3))
    assert suspects.weight("innocent") == 0
    assert suspects.suspicion("innocent") is not None
    clock.now += EXPLAINED_SECONDS
    assert suspects.suspicion("innocent") is None
    assert [suspects.explained(engine, 3600) for engine in range(4)] == [1, 0, 0, 1]
    assert suspects.explained(0, EXPLAINED_SECONDS - 1) == 0
    # Who notices such a death late is not accused of it.
    late = EngineDeath(9)
    convict(suspects, "b", engines=(7, 8))
    late.explained = True
    suspects.accuse(late, accused("late"))
    assert suspects.suspicion("late") is None


def test_a_death_by_other_hands_accuses_nobody(suspects) -> None:
    first, second = EngineDeath(0), EngineDeath(1)
    suspects.accuse(first, accused("a", alone=True, who="x"))
    suspects.absolve(first)
    assert suspects.suspicion("a") is None
    suspects.accuse(EngineDeath(2), accused("a", who="x"))
    assert suspects.accuse(second, accused("a", alone=True, who="x")) is not None
    suspects.absolve(second)
    assert suspects.conviction("a") is None
    suspects.accuse(second, accused("late", who="x"))
    assert suspects.suspicion("late") is None


def test_a_conviction_that_is_taken_back_explains_nothing(suspects, clock) -> None:
    """All are suspects of the earlier death again, but for those who were answered meanwhile."""
    first, second = EngineDeath(0), EngineDeath(1)
    for name in ("innocent", "killing", "answered"):
        suspects.accuse(first, accused(name, who=f"client of {name}"))
    clock.now += 60
    assert suspects.accuse(second, accused("innocent", alone=True, who="x")) is not None
    suspects.acquit("answered", ())
    assert suspects.explained(0, 3600) == suspects.explained(1, 3600) == 1
    suspects.absolve(second)
    assert suspects.explained(0, 3600) == suspects.explained(1, 3600) == 0
    clock.now += SUSPECTED_SECONDS - 61
    assert suspects.suspicion("answered") is suspects.conviction("innocent") is None
    for name in ("innocent", "killing"):
        assert suspects.suspicion(name).deaths == 1
        assert suspects.weight(name) == pytest.approx(1 / 3)
    third = EngineDeath(2)
    assert suspects.accuse(third, accused("killing", alone=True)) is not None
    clock.now += EXPLAINED_SECONDS
    assert suspects.suspicion("innocent") is None
    # A person who has pardoned it meanwhile is obeyed.
    fourth, fifth = EngineDeath(3), EngineDeath(4)
    suspects.accuse(fourth, accused("pardoned"))
    assert suspects.accuse(fifth, accused("pardoned", alone=True)) is not None
    suspects.forget("pardoned")
    suspects.absolve(fifth)
    assert suspects.suspicion("pardoned") is None


def test_a_pardon_holds_for_a_process_whose_clock_is_ahead(suspects, clock) -> None:
    convict(suspects, "a")
    suspects.accuse(EngineDeath(4), accused("b"))
    suspects.accuse(EngineDeath(5), accused("c", alone=True, who="somebody"))
    clock.now -= 25 * 3600  # the wall's clock was set back before a person pardons
    person = Suspects(clock, suspects.state())
    assert all(person.forget(one) for one in ("a", "b", "somebody"))
    clock.now += 25 * 3600
    suspects.merge(person.state())
    assert suspects.conviction("a") is suspects.suspicion("b") is None
    assert suspects.accounts.newest("somebody") == 0


def test_a_pardon_ends_both(suspects, clock) -> None:
    convict(suspects, "a")
    suspects.accuse(EngineDeath(4), accused("b"))
    assert (suspects.forget("a"), suspects.forget("b"), suspects.forget("c")) == (True, True, False)
    assert (suspects.conviction("a"), suspects.suspicion("b")) == (None, None)
    # What others still have written down is older than the pardon.
    clock.now += 1
    other = Suspects(clock, Suspects(clock).state())
    convict(other, "a")
    stale = other.state()
    clock.now += 1
    other.forget("a")
    other.merge(stale)
    assert other.conviction("a") is None
    clock.now += 1
    convict(other, "a")
    assert other.conviction("a") is not None


def test_what_is_kept_is_read_again_and_holds_no_more_than_hashes(suspects, clock) -> None:
    convict(suspects, "a", "beside")
    suspects.accuse(EngineDeath(4), accused("b"))
    state = suspects.state()
    again = Suspects(clock, state)
    assert again.conviction("a") == suspects.conviction("a")
    assert again.suspicion("b").deaths == 1
    assert again.weight("b") == pytest.approx(suspects.weight("b"))
    assert again.knows("sketch a")
    assert again.knows("sketch b")
    assert again.accounts.state() == suspects.accounts.state() != {}
    assert "prompt" not in to_json(state)
    # A suspect from before the restart is convicted by its second death, too.
    assert again.accuse(EngineDeath(0), accused("b", alone=True)) is not None


def test_numbers_are_bounded(suspects, clock) -> None:
    death = EngineDeath(0)
    for number in range(4100):
        suspects.accuse(death, accused(f"{number}"))
    assert suspects.number == (4096, 0)
    assert suspects.suspicion("0") is None
    for number in range(1030):
        suspects.accuse(EngineDeath(1), accused(f"{number + 3000}", alone=True))
    assert suspects.number[1] == 1024
    assert suspects.conviction("3000") is None


def test_new_variations_are_met_by_their_client_s_budget(suspects) -> None:
    for number in range(BUDGET // 2):
        assert suspects.accounts.seconds_refused(("bad",)) == 0
        crowd = EngineDeath(0)
        suspects.accuse(crowd, accused("good", who="good"))
        suspects.accuse(crowd, accused(f"variation {number}", who="bad"))
        suspects.accuse(EngineDeath(1), accused(f"variation {number}", who="bad", alone=True))
        suspects.acquit("good", ("good",))
    assert suspects.accounts.seconds_refused(("bad",)) == 3600
    assert suspects.accounts.seconds_refused(("good",)) == 0
    assert suspects.accounts.refused == 1


def test_what_was_cleared_does_not_come_back_from_what_others_wrote(suspects, clock) -> None:
    suspects.accuse(EngineDeath(0), accused("answered"))
    killed = EngineDeath(1)
    suspects.accuse(killed, accused("beside"))
    others = Suspects(clock, suspects.state())
    clock.now += 1
    suspects.acquit("answered", ())
    suspects.absolve(killed)
    suspects.merge(others.state())
    assert suspects.number == (0, 0)
    others.merge(suspects.state())
    assert others.number == (0, 0)
    # What comes later counts, and an old note is not kept.
    clock.now += 1
    suspects.accuse(EngineDeath(2), accused("answered"))
    suspects.merge(others.state())
    assert suspects.suspicion("answered").deaths == 1
    assert set(suspects.state().cleared) == {"answered", "beside"}
    clock.now += SUSPECTED_SECONDS
    assert suspects.state().cleared == {}


def test_an_answer_elsewhere_takes_no_conviction_back(suspects, clock) -> None:
    suspects.accuse(EngineDeath(0), accused("a"))
    others = Suspects(clock, suspects.state())
    assert suspects.accuse(EngineDeath(1), accused("a", alone=True)) is not None
    clock.now += 1
    others.acquit("a", ())
    suspects.merge(others.state())
    assert suspects.conviction("a") is not None


def test_a_conviction_that_is_taken_back_leaves_the_suspicion_before_it(suspects, clock) -> None:
    """With others too, who have read that it was convicted."""
    suspects.accuse(EngineDeath(0), accused("a"))
    clock.now += 1
    second = EngineDeath(1)
    assert suspects.accuse(second, accused("a", alone=True)) is not None
    others = Suspects(clock, suspects.state())
    suspects.absolve(second)
    suspects.merge(others.state())
    others.merge(suspects.state())
    for one in (suspects, others):
        assert (one.conviction("a"), one.suspicion("a").deaths) == (None, 1)
    assert suspects.accuse(EngineDeath(2), accused("a", alone=True)) is not None
    clock.now += CONVICTED_SECONDS
    assert suspects.state().withdrawn == {}


def test_what_was_taken_back_is_bounded(suspects) -> None:
    for number in range(4100):
        suspects.accuse(EngineDeath(0), accused(f"{number}"))
        suspects.acquit(f"{number}", ())
        suspects.forget(f"{number}")
    state = suspects.state()
    assert (len(state.cleared), len(state.forgotten)) == (4096, 4096)
    assert "0" not in state.cleared
