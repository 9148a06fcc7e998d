"""The steps of a calibration, before a stand-in for the engine: order, what is kept, going on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.core.errors import LaunchError, MachineError
from turbofit.core.units import MIB
from turbofit.launch.calibrate.calibrate import calibration_of, learned, relieve, stored
from turbofit.launch.calibrate.calibrator import Calibrator, Progress
from turbofit.launch.serve import ladder
from turbofit.observe import calibrations
from turbofit.observe.log_events import CacheBudget
from turbofit.observe.sampler import SampledRange
from turbofit.report.views.measured_view import calibration_view

STEPS = ["steady", "kernels", "vision_request", "vision_forward", "text_prefill", "sampling"]
PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


class Usage:
    """A card on which everything takes as much as a list says, in MiB."""

    def __init__(self, *used: int, before: int = 0) -> None:
        self.used, self._before = list(used), before

    def __call__(self, plan: Any) -> Usage:
        self.plan, self.before = plan, {one.index: self._before * MIB for one in plan.gpus}
        return self

    def read(self, _: Any) -> dict[int, SampledRange]:
        if not self.used:
            raise MachineError("GPU 0 is lost", hint="see nvidia-smi")
        return {0: SampledRange(peak=self.used[0] * MIB, last=self.used.pop(0) * MIB)}

    def end(self) -> None:
        pass


def engine(more: int = 0) -> Any:
    """One that found so many MiB more free than planned."""
    free = int(PLAN.kv.region_bytes / PLAN.settings.cache_max_entry_count) + more * MIB
    budget = CacheBudget(budget=PLAN.kv.region_bytes, free=free, ratio=0.5)
    return SimpleNamespace(group=0, name="engine", tracker=SimpleNamespace(budget=budget))


def drive(progress: Progress, usage: Usage, more: int = 0) -> list[str]:
    questions = []

    def ask(question: Any) -> int:
        questions.append(question.name)
        return 3400

    calibrator = Calibrator(usage, progress, lambda _: None)
    calibrator.begin(PLAN)
    calibrator.examine(engine(more), "m", ask)
    return questions


def progress() -> Progress:
    return Progress("internvl2-8b", {"tp": 1}, pretend=False)


def test_every_step_is_driven_and_kept() -> None:
    first = progress()
    questions = drive(first, Usage(*range(20000, 20600, 100)))
    assert questions[:2] == ["a small image", "a small text"]
    assert questions[3:] == STEPS[3:]
    assert first.complete
    (seen,) = first.seen
    assert list(seen.cards[0].used) == STEPS
    assert seen.cards[0].used["sampling"] == 20500 * MIB
    assert seen.region == PLAN.kv.region_bytes
    assert progress().seen == first.seen
    assert first.texts == {0: 3400 - 13 * 256}


def test_a_log_that_is_read_late_still_says_what_was_free() -> None:
    late = engine()
    budget, late.tracker.budget = late.tracker.budget, None

    def ask(_: Any) -> int:
        late.tracker.budget = budget
        return 3400

    first = progress()
    calibrator = Calibrator(Usage(*[20000] * 6), first, lambda _: None)
    calibrator.begin(PLAN)
    calibrator.examine(late, "m", ask)
    assert (first.seen[0].free, first.seen[0].region) == (budget.free, budget.budget)


@pytest.mark.parametrize(("more", "asked"), [(0, 2), (1024, 6)])
def test_a_run_that_ended_before_it_learned_starts_once_more(more: int, asked: int) -> None:
    """Others may have given memory back while it was measured, and taken as much again since."""
    drive(progress(), Usage(*[20000 - more] * 6), more)
    again = progress()
    assert not again.complete
    assert len(drive(again, Usage(*[20000] * 6))) == asked
    assert again.complete
    assert {again.seen[0].cards[0].used[name] for name in STEPS} == {20000 * MIB}


@pytest.mark.parametrize(("more", "shift"), [(0, 17), (33, 0), (1024, -17)])
def test_what_was_read_while_others_gave_memory_back_is_read_again(more: int, shift: int) -> None:
    """They took as much again before the next run: its engine finds and takes what it did not."""
    with pytest.raises(LaunchError, match="GPU 0 is lost"):
        drive(progress(), Usage(20000, 20001, 20100, 20200, before=1024), more)
    used = [20000 + shift, 20001, 20300, 20400, 20500, 20600]
    again = progress()
    assert len(drive(again, Usage(*used, before=1024))) == len(STEPS)
    assert again.complete
    assert [again.seen[0].cards[0].used[name] // MIB for name in STEPS] == used


def test_an_engine_of_an_earlier_plan_is_not_read() -> None:
    """Its last question was answered while turbofit planned anew."""
    first = progress()
    usages = iter([Usage(*[20000] * 6), Usage(), Usage()])

    def usage_of(plan: Any) -> Usage:
        return next(usages)(plan)

    calibrator = Calibrator(usage_of, first, lambda _: None)
    calibrator.begin(PLAN)

    def ask(_: Any) -> int:
        calibrator.begin(PLAN)
        return 3400

    with pytest.raises(LaunchError, match="another plan is launched"):
        calibrator.examine(engine(), "m", ask)
    assert [list(one.cards[0].used) for one in first.seen] == [["steady"]]


def test_a_run_that_was_cut_short_goes_on_after_its_last_step() -> None:
    with pytest.raises(LaunchError, match="GPU 0 is lost"):
        drive(progress(), Usage(20000, 20001, 20100, 20200))
    again = progress()
    assert not again.complete
    # Others hold 3 MiB more now: what was read before is as if they always had held the same.
    questions = drive(again, Usage(20003, 20004, 20303, 20403, before=3))
    assert questions[2:] == ["text_prefill", "sampling"]
    assert again.complete
    used = again.seen[0].cards[0].used
    assert [used[name] // MIB for name in STEPS] == [20000, 20001, 20100, 20200, 20300, 20400]
    assert again.forget()
    assert progress().plan is None


def test_another_plan_or_other_neighbours_begin_again() -> None:
    with pytest.raises(LaunchError):
        drive(progress(), Usage(20000, 20001, 20100))
    assert len(drive(progress(), Usage(*[20000] * 6, before=100))) == 6
    other = Progress("internvl2-8b", {"tp": 2}, pretend=False)
    assert other.plan is None
    apart = Progress("internvl2-8b", {"tp": 1}, pretend=True)
    assert apart.plan is None
    begun = progress()
    drive(begun, Usage(*[20000] * 2, before=100))
    assert begun.complete
    begun.begin(replace(PLAN, settings=replace(PLAN.settings, max_batch_size=3)), {0: 0})
    assert not begun.complete
    assert begun.seen == ()


def test_a_plan_on_fewer_gpus_begins_again() -> None:
    going = progress()
    both = api.plan("internvl2-8b", on="2xrtx3090", engine="turbomind", tp=1, replicas=2)
    going.begin(both, {0: 0, 1: 0})
    going.begin(PLAN, {0: 0})
    assert going.plan == PLAN
    assert not going.has(0, "steady")


class OneCard(Usage):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def read(self, _: Any) -> dict[int, SampledRange]:
        return {self.index: SampledRange(peak=MIB, last=MIB)}


def test_each_unequal_engine_is_driven_to_its_own_limits() -> None:
    plan = api.plan("internvl2.5-8b", on="rtx3090+l40s", engine="turbomind", concurrency=8)
    paid = [plan.of_group(group).limits.units_per_forward for group in (0, 1)]
    assert paid[0] != paid[1]
    bodies = []
    for group in (0, 1):
        questions: list[Any] = []
        calibrator = Calibrator(OneCard(plan.parallel.groups[group][0]), progress(), print)
        calibrator.begin(plan)
        driven = engine()
        driven.group = group
        calibrator.examine(driven, "m", lambda question, to=questions: to.append(question) or 3400)
        bodies.append({one.name: str(one.body) for one in questions})
    assert bodies[0]["sampling"] != bodies[1]["sampling"]


def test_what_was_learned_is_kept_for_plans_on_such_cards() -> None:
    done = progress()
    drive(done, Usage(*[PLAN.gpus[0].steady // MIB] * 6))
    result = learned(PLAN, done.seen, {}, lmdeploy="0.18.0", pretend=False)
    assert result["why_not"] is None
    assert [row["phase"] for row in result["phases"]] == ["context and weights", "cache", *STEPS]
    machine = calibrations.with_calibrations(PLAN.machine, pretend=False)
    assert calibration_of(PLAN) is None
    known = calibration_of(replace(PLAN, machine=machine))
    assert known is not None
    assert known.lmdeploy == "0.18.0"
    again = stored(replace(PLAN, machine=machine))
    assert again["phases"] == result["phases"]
    text = str(calibration_view(again))
    assert "your cards (NVIDIA GeForce RTX 3090) take " in text
    assert "PRETEND" not in text


def test_what_restarts_learned_is_dropped_only_where_something_was_missing() -> None:
    def known() -> dict[str, Any]:
        return ladder.recall(PLAN, "0.18.0", pretend=False)

    ladder.remember(PLAN, "0.18.0", pretend=False, changes={"margin": 7}, why="x")
    less = {"calibrations": [{"context": -5, "buffers": 3}], "kept": ["file"]}
    assert not relieve(PLAN, less, "0.18.0", pretend=False)
    more = {"calibrations": [{"context": -5, "buffers": 9}], "kept": ["file"]}
    assert not relieve(PLAN, {**more, "kept": []}, "0.18.0", pretend=False)
    assert not relieve(PLAN, more, "0.18.0", pretend=True)
    assert known() == {"margin": 7}
    assert relieve(PLAN, more, "0.18.0", pretend=False)
    assert known() == {}


@pytest.mark.parametrize(
    ("why", "place", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "turbofit.core.process.files._created",
         "cannot be written: No space left"),
        (None, "turbofit.launch.calibrate.calibrate.memory_now",
         "200 MiB more in use than before"),
    ],
)  # fmt: skip
def test_what_was_measured_is_told_where_nothing_is_learned(monkeypatch, why, place, told) -> None:
    """The disk does not take it, or somebody else's memory moved."""
    done = progress()
    drive(done, Usage(*[PLAN.gpus[0].steady // MIB] * 6))

    def answer(*_: Any, **__: Any) -> Any:
        if why is not None:
            raise why
        return SimpleNamespace(used=200 * MIB)

    monkeypatch.setattr(place, answer)
    before = {} if why else {0: 0}
    result = learned(PLAN, done.seen, before, lmdeploy="0.18.0", pretend=False)
    assert told in result["why_not"]
    assert result["kept"] == []
    assert result["calibrations"]
    assert calibrations.recall(pretend=False) == ()
    assert "nothing was learned" in str(calibration_view(result))
