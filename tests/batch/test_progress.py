from __future__ import annotations

import pytest

from turbofit.batch.progress import BatchProgress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_tells_rate_and_time_left() -> None:
    clock = Clock()
    progress = BatchProgress(1000, 100, 10, clock)
    progress.begin()
    assert progress.line == "110 of 1,000: 10 failed"
    clock.now += 10
    for number in range(90):
        progress.count(failed=number == 0)
    assert progress.line == "200 of 1,000: 11 failed, 9.0/s, 89 s left"
    assert (progress.left, progress.rate, progress.seconds) == (800, 9.0, 10.0)
    progress.waiting = "waiting for the server: no connection"
    assert progress.line == "200 of 1,000: 11 failed, waiting for the server: no connection"


@pytest.mark.parametrize(("total", "left"), [(7200, "2 h 00 min"), (600, "10 min"), (100, "100 s")])
def test_long_times_are_hours(total, left) -> None:
    clock = Clock()
    progress = BatchProgress(total + 1, 0, 0, clock)
    assert progress.seconds == 0.0
    progress.begin()
    clock.now += 1
    progress.count(failed=False)
    assert progress.line.endswith(f", {left} left")
