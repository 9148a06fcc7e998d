"""How a PyTorch engine's end is read: from its words, since its server lives on."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.errors import LaunchError, OutOfMemoryError
from turbofit.core.plan import Plan, PlannedEngine
from turbofit.launch.engine.loop import loop_ended, no_cache, raced, torch_ran_out
from turbofit.launch.engine.pretend_usage import PretendDeath
from turbofit.launch.engine.startup_tracker import StartupTracker

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has"
LOG = Path("engine-0.log")
FAILED = "2026-11-20 15:21:22,051 - lmdeploy - ERROR - engine.py:671 - Engine main loop failed."


@pytest.fixture
def plan() -> Plan:
    return replace(
        plausible_plan(gpus=1, tp=1), engine=PlannedEngine(name="pytorch", version="0.18")
    )


def watched(plan: Plan, *lines: str) -> StartupTracker:
    tracker = StartupTracker(plan)
    for number, line in enumerate(lines):
        tracker.see(line, 1, float(number) / 100)
    return tracker


def test_a_loop_that_died_of_an_image(plan: Plan) -> None:
    tracker = watched(
        plan,
        "INFO:     Uvicorn running on http://127.0.0.1:1",
        FAILED,
        "    image_embeds = self.visual(pixel_values)",
        OOM,
    )
    assert tracker.loop_failed(0.05)
    end = loop_ended(tracker, plan, LOG)
    assert (end.kind, end.phase, end.requested) == ("out_of_memory", "vision", 640 << 20)
    assert isinstance(end.error, OutOfMemoryError)
    assert end.is_oom


def test_the_pretend_account_says_where_and_how_much_was_missing(plan: Plan) -> None:
    tracker = watched(plan, FAILED, OOM)
    death = PretendDeath(
        gpu=0, where="qwen2_vl.py:449 forward", requested=100, left=40, short=60, phase="start"
    )
    end = loop_ended(tracker, plan, LOG, death)
    assert (end.missing, end.left, end.where) == (60, 40, "qwen2_vl.py:449 forward")


def test_a_cache_that_finds_no_memory_is_none_of_the_weights(plan: Plan) -> None:
    loading = "Loading weights from safetensors: 100%|##########| 4/4"
    said = f"{OOM} a total capacity of 11.62 GiB of which 512.00 MiB is free. Including"
    tracker = watched(plan, loading, "    self.build_cache_engine()", said)
    end = torch_ran_out(tracker.fault, tracker, plan, LOG)
    assert (end.phase, end.missing) == ("cache", 128 << 20)
    assert "when it allocated the cache" in end.error.message
    assert "--margin" in end.error.hint
    death = PretendDeath(gpu=0, where="layout.py:63", requested=100, left=40, short=60, phase="")
    assert torch_ran_out(tracker.fault, tracker, plan, LOG, death).missing == 128 << 20
    early = watched(plan, loading, said)
    assert torch_ran_out(early.fault, early, plan, LOG).phase == "weights"


def test_a_loop_that_died_of_something_else_waits_for_its_words(plan: Plan) -> None:
    tracker = watched(plan, FAILED, "KeyError: 'x'")
    assert not tracker.loop_failed(0.5)
    assert tracker.loop_failed(2.5)
    end = loop_ended(tracker, plan, LOG)
    assert end.kind == "crash"
    assert end.retryable
    assert "503" in end.error.message


def test_no_room_for_a_cache(plan: Plan) -> None:
    tracker = watched(plan, "RuntimeError: No enough gpu memory for kv cache.")
    assert tracker.no_cache == "kv cache"
    assert no_cache(tracker, plan, LOG).phase == "cache"


def test_processes_that_missed_each_other_are_started_again(plan: Plan) -> None:
    assert watched(plan, "EOFError").raced
    late = watched(plan, "INFO:     Uvicorn running on http://127.0.0.1:1", "EOFError")
    assert not late.raced
    end = raced(LOG)
    assert end.retryable
    assert isinstance(end.error, LaunchError)


def test_a_turbomind_s_log_is_read_as_before() -> None:
    tracker = watched(plausible_plan(gpus=1, tp=1), FAILED, "EOFError")
    assert not tracker.raced
    assert not tracker.loop_failed(10.0)
