"""What the examiner of a calibration drives, reads of GPUs and times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from turbofit import api
from turbofit.core.errors import LaunchError, MachineError, UsageError
from turbofit.core.machine import MeasuredSteps, StepPoint
from turbofit.core.units import MIB
from turbofit.logs.log_events import CacheBudget
from turbofit.measure import calibrator as module
from turbofit.measure.calibrator import Calibrator
from turbofit.measure.memory_usage import SampledRange
from turbofit.serving.calibration import learn

PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")


STEPS = ["steady", "kernels", "vision_request", "vision_forward", "text_prefill", "sampling"]


class Usage:
    """A card on which everything takes as much as a list says, in MiB."""

    def __init__(self, *used: int, card: int = 0) -> None:
        self.used, self.card = list(used), card

    def __call__(self, plan: Any) -> Usage:
        self.plan, self.before = plan, {one.index: 0 for one in plan.ledgers}
        return self

    def read(self, _: Any) -> dict[int, SampledRange]:
        if not self.used:
            raise MachineError("GPU 0 is lost", hint="see nvidia-smi")
        return {self.card: SampledRange(peak=self.used[0] * MIB, last=self.used.pop(0) * MIB)}

    def end(self) -> None:
        pass


def engine() -> Any:
    free = int(PLAN.engines[0].kv.region_bytes / PLAN.engines[0].settings.cache_max_entry_count)
    budget = CacheBudget(budget=PLAN.engines[0].kv.region_bytes, free=free, ratio=0.5)
    return SimpleNamespace(
        group=0, planned=PLAN.engines[0], name="engine", tracker=SimpleNamespace(budget=budget),
        pretended=True, clock=None,
    )  # fmt: skip


def drive(calibrator: Calibrator, one: Any = None, before: Any = None) -> list[Any]:
    """Examine an engine, which `before` is called for at each question; the questions."""
    questions = []

    def ask(question: Any) -> int:
        questions.append(question)
        if before is not None:
            before()
        return 3400

    calibrator.examine(one or engine(), "m", ask)
    return questions


def begun(usage: Any) -> Calibrator:
    calibrator = Calibrator(usage, lambda _: None)
    calibrator.begin(PLAN)
    return calibrator


def driven() -> Calibrator:
    calibrator = begun(Usage(*[PLAN.ledgers[0].steady // MIB] * 6))
    drive(calibrator)
    return calibrator


def test_every_step_is_driven_and_kept() -> None:
    late = engine()
    budget, late.tracker.budget = late.tracker.budget, None
    first = begun(Usage(*range(20000, 20600, 100)))
    assert not first.complete
    asked = drive(first, late, lambda: setattr(late.tracker, "budget", budget))
    questions = [question.name for question in asked]
    assert (questions[:2], questions[3:]) == (["a small image", "a small text"], STEPS[3:])
    assert first.complete
    (seen,) = first.observations
    assert list(seen.cards[0].used) == STEPS
    assert seen.cards[0].used["sampling"] == 20500 * MIB
    assert seen.region == PLAN.engines[0].kv.region_bytes
    assert (seen.free, seen.region) == (budget.free, budget.budget)


def test_an_engine_that_is_started_again_shows_all_steps_again() -> None:
    used = [20000, 20001, 20100, 20200, 20300, 20400]
    usage = Usage(30000, 30001, 30100)
    first = begun(usage)
    with pytest.raises(LaunchError, match="GPU 0 is lost"):
        drive(first)
    assert not first.complete
    usage.used = list(used)
    assert len(drive(first)) == len(STEPS)
    assert first.complete
    assert [first.observations[0].cards[0].used[name] // MIB for name in STEPS] == used
    usage.used = [30000]
    with pytest.raises(LaunchError, match="GPU 0 is lost"):
        drive(first)
    assert not first.complete


def test_an_engine_of_an_earlier_plan_is_not_read() -> None:
    usages: Any = iter([Usage(*[20000] * 6), *(Usage() for _ in STEPS)])

    def usage_of(plan: Any) -> Usage:
        return next(usages)(plan)

    first = begun(usage_of)
    assert len(drive(first, before=lambda: first.begin(PLAN))) == len(STEPS)
    assert first.observations == ()
    assert not first.complete


def test_each_unequal_engine_is_driven_to_its_own_limits() -> None:
    plan = api.plan("internvl2.5-8b", on="rtx3090+l40s", engine="turbomind", concurrency=8)
    paid = [each.units_per_forward for each in plan.engines]
    assert paid[0] != paid[1]
    bodies = []
    for group in (0, 1):
        calibrator = Calibrator(Usage(*[1] * 9, card=plan.groups[group][0]), print)
        calibrator.begin(plan)
        one = engine()
        one.group, one.planned = group, plan.engines[group]
        bodies.append({asked.name: str(asked.body) for asked in drive(calibrator, one)})
    assert bodies[0]["sampling"] != bodies[1]["sampling"]


def test_steps_are_timed_once_for_each_kind_of_cards_and_kept(monkeypatch) -> None:
    steps = MeasuredSteps(quant_policy=0, points=(StepPoint(sequences=1, cached=64, seconds=0.01),))
    asked: list[object] = []

    class Timer:
        def __init__(self, *words: object) -> None:
            asked.append(words[2:])

        def measure(self, _: object) -> MeasuredSteps:
            return steps

    monkeypatch.setattr(module, "StepTimer", Timer)
    calibrator = begun(Usage(*range(100, 130)))
    one = engine()
    one.pretended, one.url, one.client = None, "http://engine", SimpleNamespace(key="k")
    drive(calibrator, one)
    assert asked == [(("http://engine", "m", "k"), None)]
    (seen,) = calibrator.observations
    assert seen.steps == steps
    (found,) = learn(PLAN, (seen,), lmdeploy="0.18.0", when="2026-11-29", pretend=False)
    assert found.steps == steps
    assert calibrator._steps(PLAN, one, "m") is None


def test_steps_that_contradict_each_other_are_not_kept(monkeypatch) -> None:
    told: list[str] = []
    calibrator = Calibrator(Usage(*range(100, 130)), told.append)
    calibrator.begin(PLAN)

    class Timer:
        def __init__(self, *_: object) -> None: ...

        def measure(self, _: object) -> MeasuredSteps:
            raise UsageError("timed steps contradict each other: …", hint="")

    monkeypatch.setattr(module, "StepTimer", Timer)
    one = engine()
    one.pretended, one.url, one.client = None, "http://engine", SimpleNamespace(key=None)
    drive(calibrator, one)
    assert calibrator.observations[0].steps is None
    assert told[-1] == "warning: no step is kept: timed steps contradict each other: …"
