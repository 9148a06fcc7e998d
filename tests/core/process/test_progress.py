"""Who tells, who listens: each thread has its step, the process one listener."""

from __future__ import annotations

import threading

from turbofit.core.process import progress
from turbofit.core.process.progress import Step, listened, tell, under_way


def test_what_was_under_way_before_comes_back() -> None:
    heard: list[str | None] = []
    with listened(lambda step: heard.append(step and step.text)):
        assert progress.listening()
        tell(Step("loading", 1, 4, "requests", "0 failed"))
        with under_way("planning"):
            tell(None)
    assert not progress.listening()
    loading = "loading: 1 of 4 requests, 0 failed"
    assert heard == [loading, "planning", None, loading]


def test_another_threads_step_does_not_come_back() -> None:
    heard: list[str | None] = []

    def drain() -> None:
        with under_way("draining"):
            pass

    with listened(lambda step: heard.append(step and step.text)):
        tell(Step("loading weights"))
        other = threading.Thread(target=drain)
        other.start()
        other.join()
    assert heard == ["loading weights", "draining", None]
