"""The garbage collector of a process whose start makes what stays."""

from __future__ import annotations

import gc

from turbofit.core.process.collector import USUAL_THRESHOLDS, collect_after


def test_garbage_is_collected_as_usual_after_the_imports() -> None:
    before = gc.get_threshold()
    try:
        collect_after(600_000)
        assert gc.get_threshold()[0] > 500_000
        gc.collect(0)
        assert gc.get_threshold() == USUAL_THRESHOLDS
    finally:
        gc.set_threshold(*before)
