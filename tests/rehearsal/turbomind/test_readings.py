"""How a rehearsal of TurboMind ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.rehearsal.test_planned import ended, seen
from turbofit.rehearsal.planned import outcome_and_end
from turbofit.rehearsal.turbomind import readings


def test_turbominds_silent_hang_refuses_nothing_that_matters() -> None:
    memory: Any = SimpleNamespace(deaths=[{"phase": "weights", "asked": 9}], phases=["engine"])
    for stopped, outcome in (("stuck", "hang"), ("idle", "out_of_memory")):
        run = ended(-9, stopped)
        run.log = ["out of memory at 0/1"]
        assert outcome_and_end(run, seen(**readings.end_of(run, memory)))[0] == outcome


def test_a_turbomind_that_dies_after_a_wait_did_not_hang() -> None:
    memory: Any = SimpleNamespace(deaths=[], phases=["engine"])
    wait = "[TM][INFO][scheduler.cc:1186] out of memory at 0/1"
    fatal = "[TM][FATAL][allocator.cc:9] CUDA error: out of memory"
    for log, kind in (([wait], "crash"), ([fatal, wait], "out_of_memory"), ([], "crash")):
        run = ended(-9)
        run.log = log
        end = readings.end_of(run, memory)
        assert (end["kind"], end["where"]) == (kind, (log or [""])[0])
        assert outcome_and_end(run, seen(**end))[0] == kind.replace("crash", "failed")
    lines = "CUDA error: out of memory\nCUDA kernel errors might be late"
    run = ended(1, error={"type": "AcceleratorError", "message": lines, "frames": []})
    run.log = [wait]
    assert readings.end_of(run, memory)["kind"] == "out_of_memory"
