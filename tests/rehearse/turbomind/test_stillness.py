"""How long something has not changed."""

from __future__ import annotations

from turbofit.rehearse.turbomind.stillness import Stillness


def test_work_is_not_stillness() -> None:
    now, value = 0.0, 0
    still = Stillness(lambda: value, lambda: now)
    now = 100.0
    assert still.seconds() == 100
    value = 1  # it moved at last
    assert still.seconds() == 0
    now = 130.0
    assert still.seconds() == 30
    assert still.since_start() == 130
