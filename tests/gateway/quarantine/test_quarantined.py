"""What is kept of requests that engines died of, by a clock that was set back since."""

from __future__ import annotations

from turbofit.gateway.quarantine.quarantined import (
    CONVICTED_SECONDS,
    SUSPECTED_SECONDS,
    Conviction,
    Quarantined,
    Suspicion,
)


def kept(*times: float) -> Quarantined:
    """A suspicion, a conviction, two deaths of a client and what was taken back, at these times."""
    suspected, convicted, first, second, forgotten = times
    return Quarantined(
        suspects=(
            Suspicion(
                fingerprint="a", sketch="", deaths=1, last=suspected,
                until=suspected + SUSPECTED_SECONDS, weight=1.0,
            ),
        ),
        convicted=(
            Conviction(
                fingerprint="b", sketch="", since=convicted,
                until=convicted + CONVICTED_SECONDS, engines=2,
            ),
        ),
        clients={"c": (first, second)},
        forgotten={"d": forgotten},
        cleared={"e": forgotten},
        withdrawn={"f": forgotten},
    )  # fmt: skip


def test_what_is_dated_ahead_is_moved_together_and_the_rest_stays() -> None:
    written = kept(7000.0, 9000.0, 500.0, 8000.0, 8500.0)
    assert written.none_ahead(1000.0) == kept(-1000.0, 1000.0, 500.0, 0.0, 500.0)


def test_a_clock_that_was_not_set_back_moves_nothing() -> None:
    written = kept(7000.0, 9000.0, 500.0, 8000.0, 8500.0)
    assert written.none_ahead(9000.0) is written
    assert Quarantined().none_ahead(1.0) == Quarantined()
