"""How long a process has done nothing."""

from __future__ import annotations

from turbofit.rehearse.turbomind.inactivity import InactivityTimer


def test_work_is_not_inactivity() -> None:
    now, value = 0.0, 0
    timer = InactivityTimer(lambda: value, lambda: now)
    now = 100.0
    assert timer.inactive() == 100
    value = 1  # it moved at last
    assert timer.inactive() == 0
    now = 130.0
    assert timer.inactive() == 30
    assert timer.elapsed() == 130
