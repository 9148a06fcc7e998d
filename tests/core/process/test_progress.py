"""Who tells, who listens: each thread has its step, the process one listener."""

from __future__ import annotations

import threading

from turbofit.core.process import progress
from turbofit.core.process.progress import Step, listened, part_of, tell, under_way


def test_what_was_under_way_before_comes_back_and_a_part_names_its_whole_in_every_thread() -> None:
    heard: list[str | None] = []
    left = ["2 min left", "1 min left", "now"]
    with listened(lambda step: heard.append(step and step.text)):
        assert progress.listening()
        tell(Step("loading"))
        with under_way("planning"):
            pass
        with part_of(lambda: Step("trial 1", detail=left.pop(0))):
            tell(Step("loading", 1, 4, "requests", "0 failed"))
            other = threading.Thread(target=tell, args=(Step("measuring"),))
            other.start()
            other.join()
            tell(None)
        tell(Step("the end"))
    assert not progress.listening()
    assert heard == [
        "loading",
        "planning",
        "loading",
        "trial 1: loading: 1 of 4 requests, 0 failed, 2 min left",
        "trial 1: measuring: 1 min left",
        None,
        None,
        "the end",
    ]


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
