"""How an engine ended, and how far it had come, by the lines of its log."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.plans import changed, plausible_plan
from turbofit.core.engine_end import End
from turbofit.core.errors import LaunchError, OutOfMemoryError
from turbofit.logs.death import Exit
from turbofit.serving.engine.engine_log import StartupTracker, silence_words

LOG = Path("/state/engine-0.log")
TM = "[TM][INFO][1120.08:30:01.123456][x.cc:1] "
START = TM + "`max_context_token_num` is not set, default to 32768."
BUDGET = TM + "Object cache budget: 800.00 MB from free 1000.00 MB and ratio 0.800"
SLAB = TM + "slab_size 33554432, object_size 8388608, object_count 4, ratio 1"
WARM = TM + "Warm-up lengths: 8, 8320"
DONE = TM + "Warm-up finished in 1.00 seconds."
SERVING = (START, BUDGET, WARM, DONE)
UVICORN = "INFO:     Uvicorn running on http://127.0.0.1:1"
CUDA = "[TM][FATAL][1120.08:30:01.123456][a.cc:1] CUDA error: out of memory"
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has"
FAILED = "2026-11-20 15:21:22,051 - lmdeploy - ERROR - engine.py:671 - Engine main loop failed."
FRAME = "  [ 0] InternVit::Impl::Forward @ src/x.cc:1"


def tracker(*lines: str, engine: str = "turbomind") -> StartupTracker:
    """One that has seen these lines, a hundredth of a second apart."""
    plan = changed(plausible_plan(), engine=engine)
    seen = StartupTracker(plan, plan.engines[0], LOG)
    for number, line in enumerate(lines):
        seen.see(line, 1, number / 100)
    return seen


def end_of(code: int | None, seen: StartupTracker, host_kills: int | None = None) -> End:
    return seen.death(Exit(code, host_kills))


def torch(*lines: str) -> StartupTracker:
    return tracker(*lines, engine="pytorch")


def test_phases_come_once_and_figures_with_them() -> None:
    seen = tracker()
    said = [text for line in (START, BUDGET, BUDGET, SLAB, SLAB, WARM, DONE)
            for text in seen.see(line, 1, 0.0)]  # fmt: skip
    phases = [text.removeprefix("phase: ") for text in said if text.startswith("phase")]
    assert phases == ["weights", "cache", "warm-up", "serving"]
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
        ((*SERVING, CUDA, FRAME), -6, "vision", "InternVit"),
        ((*SERVING, CUDA, "  [ 0] LlamaLinear::Forward @ src/x.cc:1"), -6, "text", "LlamaLinear"),
        ((OOM,), 1, "weights", "asking 640 MiB"),
        (("torch.AcceleratorError: CUDA error: out of memory",), 1, "weights",
         "ran out of GPU memory while it loaded weights"),
        ((START, BUDGET, "RuntimeError: Triton Error [CUDA]: out of memory"), 1, "weights",
         "while it loaded weights"),
        ((*SERVING, "  what():  CUDA error: out of memory"), -6, "text",
         "in a forward of the language model"),
        # A call that a check guards runs out of memory too.
        ((START, BUDGET, WARM,
          CUDA.replace("CUDA error:", "Check failed: status == cudaSuccess")), -6, "warm-up", ""),
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
    error = seen.death().error
    assert error.exit_code == 3
    assert "6,144 tokens, and a request of 8,320" in error.message
    seen.see(TM + "16", 1, 13.0)
    assert not seen.hangs(60.0)
    serving = tracker(*SERVING)  # back-pressure
    serving.see(wait, 10**6, 0.0)
    serving.see(TM + "hit resource limit at 1/2", 10**6, 0.0)
    assert not serving.hangs(1e6)


@pytest.mark.parametrize(
    ("kills", "kind"), [(1, "host_memory"), (None, "host_memory"), (0, "killed")]
)
def test_who_killed_it(kills: int | None, kind: str) -> None:
    end = end_of(-9, tracker(START), host_kills=kills)
    assert (end.kind, end.retryable) == (kind, kind == "killed")
    assert (type(end.error) is LaunchError) is (kind == "killed")
    assert end.phase == ("host" if kind == "host_memory" else "")


def test_page_locked_memory_is_not_the_gpus() -> None:
    end = end_of(-6, tracker(START, BUDGET, CUDA.replace("a.cc:1", "allocator.cc:105"), FRAME))
    assert (end.kind, end.phase, end.where) == ("host_memory", "host", "InternVit::Impl::Forward")
    assert "page-locked host memory" in end.error.message


@pytest.mark.parametrize("code", [0, -9, -15, 137])
def test_evidence_that_disagrees_is_unknown_and_no_rung_is_taken(code: int) -> None:
    """The log tells of a lack of memory, and no process ends of one like that."""
    end = end_of(code, tracker(START, BUDGET, CUDA))
    assert (end.kind, end.is_oom, end.retryable) == ("unknown", False, True)
    assert "out of memory" in end.message


def test_silence_while_weights_load_may_be_a_slow_disk_whatever_the_ranks() -> None:
    plan = plausible_plan()
    for tp in (1, 2):
        settings = replace(plan.engines[0].settings, tp=tp, communicator="nccl")
        wide = changed(plan, settings=settings)
        said = silence_words(wide, wide.engines[0], "weights", 180)
        assert said.startswith("silent for 180 s in phase weights; weights may come from a slow")
        assert ("NCCL" in said) == (tp == 2)
    assert "disk" not in silence_words(plan, plan.engines[0], "warm-up", 180)


def test_a_loop_that_failed_is_waited_for_until_its_last_words() -> None:
    seen = torch(UVICORN, FAILED)
    assert seen.failing
    assert not seen.loop_failed(0.5)
    seen.see("    image_embeds = self.visual(pixel_values)", 1, 0.6)
    seen.see(OOM, 1, 0.6)
    assert seen.loop_failed(0.6)
    end = end_of(None, seen)
    assert (end.kind, end.phase, end.asked) == ("out_of_memory", "vision", 640 << 20)
    assert isinstance(end.error, OutOfMemoryError)
    other = torch(FAILED, "KeyError: 'x'")
    assert not other.loop_failed(0.5)
    assert other.loop_failed(2.5)
    end = end_of(None, other)
    assert (end.kind, end.retryable) == ("crash", True)
    assert "503" in end.error.message


def test_a_cache_that_finds_no_memory_is_none_of_the_weights() -> None:
    loading = "Loading weights from safetensors: 100%|##########| 4/4"
    said = f"{OOM} a total capacity of 11.62 GiB of which 512.00 MiB is free. Including"
    end = end_of(1, torch(loading, "    self.build_cache_engine()", said))
    assert (end.phase, end.missing) == ("cache", 128 << 20)
    assert "--margin" in end.error.hint
    assert end_of(1, torch(loading, said)).phase == "weights"
    none = torch("RuntimeError: No enough gpu memory for kv cache.")
    assert end_of(1, none).phase == "cache"
    assert end_of(None, none).kind == "crash"  # its server alone ends for want of a cache


def test_processes_that_missed_each_other_are_started_again() -> None:
    assert end_of(1, torch(UVICORN, "EOFError")).kind == "crash"
    end = end_of(1, torch("EOFError"))
    assert (end.kind, end.retryable) == ("raced", True)
    assert isinstance(end.error, LaunchError)
    turbomind = tracker(FAILED, "EOFError")
    assert end_of(1, turbomind).kind == "crash"
    assert not turbomind.loop_failed(10.0)


def test_a_cache_beyond_the_plan_is_known() -> None:
    planned = plausible_plan().engines[0].kv.region_bytes / (1 << 20)
    line = TM + "Object cache budget: {:.2f} MB from free 99999.00 MB and ratio 0.800"
    assert not tracker().cache_is_larger
    assert tracker(line.format(planned + 3)).cache_is_larger
    assert torch().cache_is_larger
    smaller = tracker(line.format(planned - 3))
    assert smaller.budget is not None
    assert not smaller.cache_is_larger
