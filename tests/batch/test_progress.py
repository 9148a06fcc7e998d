from __future__ import annotations

from types import SimpleNamespace

from turbofit.batch.batch_job import BatchProgress
from turbofit.core.process.progress import Step


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_tells_failures_and_rate() -> None:
    clock = Clock()
    output = SimpleNamespace(lines=110, failed=10)
    progress = BatchProgress(1000, output, clock)
    progress.begin()
    assert progress.step == Step("sending", 110, 1000, detail="10 failed")
    clock.now += 10
    output.lines, output.failed = 200, 11
    assert progress.step == Step("sending", 200, 1000, detail="11 failed, 9.0/s")
    assert (progress.left, progress.rate, progress.seconds) == (800, 9.0, 10.0)
    progress.waiting = "waiting for the server: no connection"
    assert progress.step.detail == "11 failed, waiting for the server: no connection"
