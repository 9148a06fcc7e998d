"""`serve`, a rehearsal and `diagnose` ask one function, and say of one log the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import yaml

from tests.support.plans import plausible_plan
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.logs import log_events as events
from turbofit.logs.death import IN_DIAGNOSIS, STATES, Course, Exit, after, death
from turbofit.logs.explain import diagnose
from turbofit.logs.log_reader import read_line
from turbofit.memory.engines import engine_named
from turbofit.rehearsal.torch.readings import _events
from turbofit.serving.engine.engine_log import StartupTracker

DEATHS: dict[str, list[str]] = yaml.decode(
    (Path(__file__).parents[1] / "logs" / "deaths.yaml").read_bytes()
)


def run_of(log: str) -> list[Struct]:
    return [event for event in map(read_line, log.splitlines()) if event is not None]


@pytest.mark.parametrize("name", [name for name in DEATHS if "turbomind" in name])
def test_the_same_log_dies_of_the_same(name: str) -> None:
    """Of TurboMind's log without a refused piece, in the same words."""
    on, _, log = DEATHS[name]
    told = death(run_of(log), known=(engine_named("turbomind", "0.18.0"), Settings()))
    plan = plausible_plan()
    tracker = StartupTracker(plan, plan.engines[0], Path("engine.log"))
    for line in log.splitlines():
        tracker.see(line, 2000, 0.0)
    served, found = tracker.death(), diagnose([log.encode()], on=on)
    assert told.kind == served.kind
    assert IN_DIAGNOSIS.get(told.kind, told.kind) == found.kind
    if told.kind == "hang":
        assert (
            found.what.split(":")[0] == served.message.split(":")[0] == told.message.split(":")[0]
        )
        return
    # Other threads print late: by their times `diagnose` and `serve` have seen the cache.
    assert found.what == served.message
    assert (found.phase == told.phase) == (found.what == told.message)


@pytest.mark.parametrize("name", [name for name in DEATHS if "pytorch" in name])
def test_torch_s_own_words_are_told_alike(name: str) -> None:
    _, _, log = DEATHS[name]
    course = Course(run_of(log))
    rehearsed = death(_events(log.splitlines()[-1]))
    told = death(course)
    assert told.kind == rehearsed.kind == "out_of_memory"
    assert (told.asked, told.left, told.gpu) == (rehearsed.asked, rehearsed.left, rehearsed.gpu)
    assert told.message.partition(": ")[2] == rehearsed.message.partition(": ")[2]
    found = diagnose([log.encode()])  # it has the source lines, too, which tell the phase
    assert found.what.partition(": ")[2] == told.message.partition(": ")[2]


def test_every_state_is_begun_by_its_events_and_left_by_none_before() -> None:
    made = {
        events.Starting: events.Starting(), events.LoadingWeights: events.LoadingWeights(),
        events.CacheBudget: events.CacheBudget(budget=1, free=1, ratio=0.5),
        events.Slab: events.Slab(slab_size=1, object_size=1),
        events.KvBlocks: events.KvBlocks(field="block_size", value=1),
        events.CacheFrame: events.CacheFrame(), events.WarmingUp: events.WarmingUp(),
        events.WarmupLengths: events.WarmupLengths(),
        events.WarmupFinished: events.WarmupFinished(), events.ServerUp: events.ServerUp(),
        events.Answered: events.Answered(),
    }  # fmt: skip
    order = list(STATES)
    for stage, begins in STATES.items():
        for kind in begins:
            for before in order:
                assert after(before, made[kind]) == max(stage, before, key=order.index)


@pytest.mark.parametrize(
    ("seen", "kind", "words"),
    [
        (None, "out_of_memory", "ran out of GPU memory while it loaded weights"),
        (Exit(-6), "out_of_memory", "ran out of GPU memory"),
        (Exit(1), "out_of_memory", "ran out of GPU memory"),
        (Exit(-11), "unknown", "which ends no process in this way"),
        (Exit(-9, 1), "unknown", "SIGKILL"),
    ],
)
def test_the_exit_must_agree_with_the_log(seen: Exit | None, kind: str, words: str) -> None:
    run = [events.Starting(), events.CudaError(message="out of memory")]
    told = death(run, plausible_plan(), seen=seen)
    assert told.kind == kind
    assert words in told.message


@pytest.mark.parametrize(
    ("seen", "kind", "words"),
    [
        (Exit(-9, 0), "killed", "somebody did it"),
        (Exit(-9, 1), "host_memory", "the kernel does so when host memory runs out"),
        (Exit(137), "host_memory", "the kernel does so"),
        (Exit(-11), "crash", "signal SIGSEGV"),
        (Exit(0), "crash", "exit code 0"),
        (Exit(None), "crash", "answers 503 until"),
    ],
)
def test_an_end_without_a_word(seen: Exit, kind: str, words: str) -> None:
    told = death([events.Starting(), events.LoadingWeights()], seen=seen)
    assert told.kind == kind
    assert words in told.message
