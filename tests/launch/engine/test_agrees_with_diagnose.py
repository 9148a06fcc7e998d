"""What `serve`, a rehearsal and `diagnose` say when an engine dies, by the same log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tests.diagnose.conftest import explain
from tests.launch.engine.test_engine_log import (
    BUDGET,
    CUDA,
    DONE,
    FAILED,
    OOM,
    SLAB,
    START,
    TM,
    UVICORN,
    WARM,
    tracker,
)
from turbofit.core.engine_end import EndKind
from turbofit.launch.engine import engine_log
from turbofit.launch.engine.engine_log import StartupTracker, end_of
from turbofit.observe.engine_end import IN_DIAGNOSIS, diagnosed
from turbofit.rehearse.torch import readings as torch_readings
from turbofit.rehearse.turbomind import readings

VISION = "  [ 0] InternVit::Impl::Forward @ src/x.cc:1"
TEXT = "  [ 0] LlamaLinear::Forward @ src/x.cc:1"


@pytest.mark.parametrize(
    ("lines", "phase"),
    [
        ((START, CUDA), "weights"),
        ((START, BUDGET, CUDA), "cache"),
        ((START, BUDGET, CUDA, TEXT), "warm-up"),
        ((START, BUDGET, WARM, CUDA), "warm-up"),
        ((START, BUDGET, WARM, CUDA, "  [ 0] Impl::InternalThreadEntry @ src/x.cc:1"), "cache"),
        ((START, BUDGET, WARM, DONE, CUDA, VISION), "vision"),
        ((START, BUDGET, WARM, DONE, CUDA, TEXT), "text"),
    ],
)
def test_both_name_the_same_phase_and_call(lines: tuple[str, ...], phase: str) -> None:
    ended, found = end_of(-6, tracker(*lines)), explain("\n".join(lines))
    assert (ended.kind, found.kind) == ("out_of_memory", "out_of_memory")
    assert (ended.phase, found.phase) == (phase, phase)
    call = lines[-1].partition("] ")[2].partition(" @")[0] if " @ " in lines[-1] else ""
    assert call in ended.message
    assert call in found.what


VERSION = "$ lmdeploy serve api_server internvl2-2b  # lmdeploy==0.18.0"
PINNED = CUDA.replace("a.cc:1", "allocator.cc:105")
LOADING = "Loading weights from safetensors: 100%|##########| 4/4"
TRACE = """Traceback (most recent call last):
  File "/x/site-packages/lmdeploy/pytorch/engine/engine.py", line 1, in f
    x()"""
KILL = "Out of memory: Killed process 4242 (python) total-vm:1kB, anon-rss:62914560kB, file-rss:0kB"
DEATHS: list[tuple[str, tuple[str, ...], int | None, EndKind]] = [
    ("turbomind", (START, CUDA), -6, "out_of_memory"),
    ("turbomind", (START, BUDGET, WARM, DONE, CUDA, VISION), 134, "out_of_memory"),
    ("turbomind", (VERSION, START, BUDGET, WARM, DONE, PINNED, VISION), -6, "host_memory"),
    ("turbomind", (START, CUDA.replace("out of memory", "misaligned address")), -6, "crash"),
    ("turbomind", (TM + "Check failed: a < b (2 vs. 1) ",), -6, "crash"),
    ("turbomind", (START, "RuntimeError: NCCL error x:1 'aborted'"), -6, "crash"),
    ("turbomind", (START, TRACE, "ValueError: no"), 1, "crash"),
    ("turbomind", (START, BUDGET, SLAB, WARM, *[TM + "out of memory at 0/1"] * 1200), None, "hang"),
    ("turbomind", (START, KILL), -9, "host_memory"),
    ("pytorch", (LOADING, TRACE, f"{OOM} a total capacity of 11.62 GiB"), 1, "out_of_memory"),
    ("pytorch", (UVICORN, FAILED, TRACE, OOM), None, "out_of_memory"),
    ("pytorch", (LOADING, TRACE, "torch.AcceleratorError: CUDA error: out of memory"), 1,
     "out_of_memory"),
    ("pytorch", (LOADING, TRACE, "RuntimeError: No enough gpu memory for kv cache."), 1,
     "out_of_memory"),
    ("pytorch", (TRACE, "EOFError"), 1, "raced"),
    ("pytorch", (UVICORN, FAILED, TRACE, "KeyError: 'x'"), None, "crash"),
    ("pytorch", (LOADING, TRACE,
     "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"), 1, "crash"),
    ("pytorch", (LOADING, KILL), -9, "host_memory"),
]  # fmt: skip
#: What `diagnose` says more exactly: a cause, where a launch has a kind.
EXACTLY = {"no_kv_memory": "out_of_memory"}


def launched(seen: StartupTracker, code: int | None) -> str:
    for second in range(3):
        seen.see(TM + "out of memory at 0/1", 0, float(second))
    return engine_log.hang(seen).kind if seen.hangs(60.0) else end_of(code, seen).kind


def rehearsed(engine: str, lines: tuple[str, ...], kind: EndKind) -> str:
    """By the log; the watch stops what hangs, and no pretend card refused anything."""
    ran = SimpleNamespace(usages=(), shared=SimpleNamespace(processes=()))
    log = [line for text in lines for line in text.splitlines()]
    stopped = "stuck" if kind == "hang" else ""
    ended: Any = SimpleNamespace(ran=ran, notes={}, log=log, stopped=stopped)
    ledger: Any = SimpleNamespace(deaths=[], phases=["serving"])
    end = torch_readings.end_of(ended) if engine == "pytorch" else readings.end_of(ended, ledger)
    return str(end["kind"])


@pytest.mark.parametrize(("engine", "lines", "code", "kind"), DEATHS)
def test_a_death_is_of_one_kind(
    engine: str, lines: tuple[str, ...], code: int | None, kind: EndKind
) -> None:
    seen = tracker(*"\n".join(lines).splitlines(), engine=engine)
    assert launched(seen, code) == kind
    assert rehearsed(engine, lines, kind) == kind
    found = explain("\n".join(lines))
    said = found.others.message if found.kind == "unknown" and found.others else found.kind
    said = EXACTLY.get(said, said)
    if kind in ("crash", "raced"):
        words = {diagnosed(other) for other in get_args(EndKind)} - {diagnosed("crash"), "unknown"}
        assert said not in words
    else:
        assert said == diagnosed(kind)


def test_a_diagnosis_has_its_own_words_where_they_differ() -> None:
    assert {kind: diagnosed(kind) for kind in get_args(EndKind) if kind != diagnosed(kind)} == (
        IN_DIAGNOSIS
    )
