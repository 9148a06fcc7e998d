from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import plausible_plan
from turbofit.core.errors import LaunchError, OutOfMemoryError
from turbofit.core.plan import Plan, PlannedEngine
from turbofit.core.rehearsal import End
from turbofit.launch.engine.engine_log import StartupTracker, end_of, hang, silence

LOG = Path("/state/engine-0.log")
TM = "[TM][INFO][1120.08:30:01.123456][x.cc:1] "
START = TM + "`max_context_token_num` is not set, default to 32768."
BUDGET = TM + "Object cache budget: 800.00 MB from free 1000.00 MB and ratio 0.800"
SLAB = TM + "slab_size 33554432, object_size 8388608, object_count 4, ratio 1"
WARM = TM + "Warm-up lengths: 8, 8320"
DONE = TM + "Warm-up finished in 1.00 seconds."
CUDA = "[TM][FATAL][1120.08:30:01.123456][a.cc:1] CUDA error: out of memory"
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has"
FAILED = "2026-11-20 15:21:22,051 - lmdeploy - ERROR - engine.py:671 - Engine main loop failed."
FRAME = "  [ 0] InternVit::Impl::Forward @ src/x.cc:1"


def tracker(*lines: str) -> StartupTracker:
    seen = StartupTracker(plausible_plan(), LOG)
    for line in lines:
        seen.see(line, 1, 0.0)
    return seen


def test_phases_come_once_and_figures_with_them() -> None:
    seen = StartupTracker(plausible_plan(), LOG)
    said = [text for line in (START, BUDGET, BUDGET, SLAB, SLAB, WARM, DONE)
            for text in seen.see(line, 1, 0.0)]  # fmt: skip
    assert [text for text in said if text.startswith("phase")] == [
        "phase: weights",
        "phase: cache",
        "phase: warm-up",
        "phase: serving",
    ]
    assert sum("free when the cache was sized" in text for text in said) == 1
    assert sum("KV tokens" in text for text in said) == 1
    assert seen.cached_tokens() == 24 * 4 * 64


@pytest.mark.parametrize(
    ("lines", "code", "phase", "words"),
    [
        ((CUDA,), -6, "start", "while it started"),
        ((START, CUDA), -6, "weights", "while it loaded weights"),
        ((START, BUDGET, CUDA), 134, "cache", "when it allocated the cache"),
        ((START, BUDGET, WARM, CUDA), -6, "warm-up", "in its warm-up"),
        ((START, BUDGET, WARM, DONE, CUDA, FRAME), -6, "vision", "InternVit"),
        ((START, BUDGET, WARM, DONE, CUDA, "  [ 0] LlamaLinear::Forward @ src/x.cc:1"), -6, "text",
         "LlamaLinear"),
        (("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",), 1, "weights",
         "asking 2.0 GiB"),
        (("torch.AcceleratorError: CUDA error: out of memory",), 1, "weights",
         "ran out of GPU memory while it started"),
        ((START, BUDGET, "RuntimeError: Triton Error [CUDA]: out of memory"), 1, "weights",
         "when it allocated the cache"),
        ((START, BUDGET, WARM, DONE, "  what():  CUDA error: out of memory"), -6, "text",
         "while it served"),
        ((START, CUDA, "RuntimeError: NCCL error x:1 'aborted'"), -6, "weights", "CUDA error"),
        ((START, CUDA), 255, "weights", "ran out of GPU memory"),  # -1 is no signal
        ((START,), -9, "host", "host memory"),
        ((START,), 137, "host", "host memory"),
    ],
)  # fmt: skip
def test_lacks_of_memory(lines: tuple[str, ...], code: int, phase: str, words: str) -> None:
    """The first fault counts, and not what follows from it."""
    ended = end_of(code, tracker(*lines))
    assert (ended.phase, ended.is_oom, ended.retryable) == (phase, True, False)
    assert type(ended.error) is OutOfMemoryError
    assert words in ended.error.message
    assert str(LOG) in ended.error.hint


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ((START, "ValueError: no"), 1, "exit code 1: ValueError: no"),
        ((START, CUDA.replace("out of memory", "misaligned address")), -6,
         "SIGABRT: CUDA error: misaligned address"),
        ((TM + "Check failed: a < b (2 vs. 1) ",), -6, "check failed: a < b"),
        ((), -11, "SIGSEGV"),
        ((), 0, "exit code 0"),
        ((), -99, "signal 99"),
        ((), 134, "SIGABRT"),
    ],
)  # fmt: skip
def test_other_endings(lines: tuple[str, ...], code: int, words: str) -> None:
    error = end_of(code, tracker(*lines)).error
    assert type(error) is LaunchError
    assert words in error.message
    assert str(LOG) in error.hint


def test_a_hang_is_many_waits_for_memory_in_the_warm_up_and_nothing_else() -> None:
    wait = TM + "out of memory at 0/1"
    seen = tracker(START, BUDGET, SLAB, WARM, TM + "8320")
    seen.see(wait, 999, 10.0)
    assert not seen.hangs(20.0)
    seen.see(wait, 1, 10.5)
    assert not seen.hangs(11.0)
    assert seen.hangs(12.5)
    error = hang(seen).error
    assert error.exit_code == 3
    assert "6,144 tokens, a request of 8,320" in error.message
    seen.see(TM + "16", 1, 13.0)
    assert not seen.hangs(60.0)


def test_back_pressure_while_serving_is_no_hang() -> None:
    seen = tracker(START, BUDGET, WARM, DONE)
    seen.see(TM + "out of memory at 0/1", 10**6, 0.0)
    seen.see(TM + "hit resource limit at 1/2", 10**6, 0.0)
    assert not seen.hangs(1e6)


def test_the_pretend_account_adds_the_bytes() -> None:
    death = End(
        gpu=2, phase="serving", where="InternVit::Impl::Forward", asked=500 << 20,
        left=300 << 20, missing=202 << 20,
    )  # fmt: skip
    ended = end_of(-6, tracker(START, BUDGET, WARM, DONE, CUDA), death=death)
    assert (ended.phase, ended.gpu, ended.missing) == ("vision", 2, 202 << 20)
    assert "it asked 500 MiB where 300 MiB were left on GPU 2" in ended.error.message
    assert "(in InternVit::Impl::Forward)" in ended.error.message
    assert ended.record()["where"] == "InternVit::Impl::Forward"


@pytest.mark.parametrize("code", [0, -9, -11, -15, 137])
def test_evidence_that_disagrees_is_unknown_and_no_rung_is_taken(code: int) -> None:
    """The log tells of a lack of memory, and no process ends of one like that."""
    end = end_of(code, tracker(START, BUDGET, CUDA))
    assert end.kind == "unknown"
    assert (end.is_oom, end.retryable) == (False, True)
    assert "out of memory" in end.message


def test_who_killed_it() -> None:
    by_kernel = end_of(-9, tracker(START), host_kills=1)
    assert (by_kernel.kind, by_kernel.phase) == ("host_memory", "host")
    nobody_knows = end_of(-9, tracker(START), host_kills=None)
    assert nobody_knows.kind == "host_memory"
    by_somebody = end_of(-9, tracker(START), host_kills=0)
    assert by_somebody.kind == "killed"
    assert by_somebody.retryable
    assert isinstance(by_somebody.error, LaunchError)


def test_a_loop_that_failed_is_waited_for_until_its_last_words() -> None:
    plan = plausible_plan()
    seen = StartupTracker(replace(plan, engine=replace(plan.engine, name="pytorch")), LOG)
    line = "2026-11-20 08:30:01,123 - lmdeploy - ERROR - engine.py:671 - Engine main loop failed."
    assert not seen.failing
    seen.see(line, 1, 10.0)
    assert seen.failing
    assert not seen.loop_failed(11.0)
    seen.see("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.", 1, 11.0)
    assert seen.loop_failed(11.0)


def test_page_locked_memory_is_not_the_gpus() -> None:
    seen = tracker(START, BUDGET, CUDA.replace("a.cc:1", "allocator.cc:105"), FRAME)
    end = end_of(-6, seen)
    assert (end.kind, end.phase, end.where) == ("host_memory", "host", "InternVit::Impl::Forward")
    assert "page-locked host memory" in end.error.message


def test_a_call_that_a_check_guards_runs_out_of_memory_too() -> None:
    checked = CUDA.replace("CUDA error:", "Check failed: status == cudaSuccess")
    end = end_of(-6, tracker(START, BUDGET, WARM, checked))
    assert (end.kind, end.phase, end.retryable) == ("out_of_memory", "warm-up", False)


def test_an_allocation_that_was_to_fail_lacked_nothing() -> None:
    death = End(
        gpu=0, phase="warm-up", where="x", asked=512, left=1 << 30, missing=None, simulated=7
    )
    end = end_of(-6, tracker(START, BUDGET, WARM, CUDA), death=death)
    assert (end.missing, end.left) == (None, 1 << 30)
    assert "simulated" in end.error.message


def test_silence_while_weights_load_may_be_a_slow_disk_whatever_the_ranks() -> None:
    plan = plausible_plan()
    for tp in (1, 2):
        settings = replace(plan.settings, tp=tp, communicator="nccl")
        said = silence(replace(plan, settings=settings), "weights", 180)
        assert said.startswith("silent for 180 s in phase weights; weights may come from a slow")
        assert ("NCCL" in said) == (tp == 2)
    assert "disk" not in silence(plan, "warm-up", 180)


@pytest.fixture
def plan() -> Plan:
    return replace(
        plausible_plan(gpus=1, tp=1), engine=PlannedEngine(name="pytorch", version="0.18")
    )


def watched(plan: Plan, *lines: str) -> StartupTracker:
    tracker = StartupTracker(plan, LOG)
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
    end = end_of(None, tracker)
    assert (end.kind, end.phase, end.asked) == ("out_of_memory", "vision", 640 << 20)
    assert isinstance(end.error, OutOfMemoryError)
    assert end.is_oom


def test_the_pretend_account_says_where_and_how_much_was_missing(plan: Plan) -> None:
    tracker = watched(plan, FAILED, OOM)
    death = End(
        gpu=0, where="qwen2_vl.py:449 forward", asked=100, left=40, missing=60, phase="start"
    )
    end = end_of(None, tracker, death=death)
    assert (end.missing, end.left, end.where) == (60, 40, "qwen2_vl.py:449 forward")


def test_a_cache_that_finds_no_memory_is_none_of_the_weights(plan: Plan) -> None:
    loading = "Loading weights from safetensors: 100%|##########| 4/4"
    said = f"{OOM} a total capacity of 11.62 GiB of which 512.00 MiB is free. Including"
    tracker = watched(plan, loading, "    self.build_cache_engine()", said)
    end = end_of(1, tracker)
    assert (end.phase, end.missing) == ("cache", 128 << 20)
    assert "when it allocated the cache" in end.error.message
    assert "--margin" in end.error.hint
    death = End(gpu=0, where="layout.py:63", asked=100, left=40, missing=60, phase="")
    assert end_of(1, tracker, death=death).missing == 128 << 20
    early = watched(plan, loading, said)
    assert end_of(1, early).phase == "weights"


def test_a_loop_that_died_of_something_else_waits_for_its_words(plan: Plan) -> None:
    tracker = watched(plan, FAILED, "KeyError: 'x'")
    assert not tracker.loop_failed(0.5)
    assert tracker.loop_failed(2.5)
    end = end_of(None, tracker)
    assert end.kind == "crash"
    assert end.retryable
    assert "503" in end.error.message


def test_no_room_for_a_cache(plan: Plan) -> None:
    tracker = watched(plan, "RuntimeError: No enough gpu memory for kv cache.")
    assert tracker.no_cache == "kv cache"
    assert end_of(1, tracker).phase == "cache"


def test_processes_that_missed_each_other_are_started_again(plan: Plan) -> None:
    early = watched(plan, "EOFError")
    assert early.raced
    late = watched(plan, "INFO:     Uvicorn running on http://127.0.0.1:1", "EOFError")
    assert not late.raced
    end = end_of(1, early)
    assert end.kind == "raced"
    assert end.retryable
    assert isinstance(end.error, LaunchError)


def test_a_turbomind_s_log_is_read_as_before() -> None:
    tracker = watched(plausible_plan(gpus=1, tp=1), FAILED, "EOFError")
    assert not tracker.raced
    assert not tracker.loop_failed(10.0)


def test_a_cache_beyond_the_plan_is_known() -> None:
    plan = plausible_plan(gpus=1, tp=1)
    planned = plan.kv.region_bytes / (1 << 20)
    line = TM + "Object cache budget: {:.2f} MB from free 99999.00 MB and ratio 0.800"
    tracker = StartupTracker(plan, LOG)
    assert not tracker.cache_is_larger
    tracker.see(line.format(planned + 3), 1, 0.0)
    assert tracker.cache_is_larger
    silent = replace(plan, engine=replace(plan.engine, name="pytorch"))
    assert StartupTracker(silent, LOG).cache_is_larger
    smaller = watched(plan, line.format(planned - 3))
    assert smaller.budget is not None
    assert not smaller.cache_is_larger
