"""A calibration: what it drives, reads of GPUs, keeps and goes on with."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from turbofit import api
from turbofit.cli.main import main
from turbofit.core.errors import LaunchError, MachineError, UsageError
from turbofit.core.machine import MeasuredSteps, StepPoint
from turbofit.core.units import MIB
from turbofit.logs.log_events import CacheBudget
from turbofit.measure import calibrate
from turbofit.measure.calibrate import Calibrator, Memory, SampledRange
from turbofit.planning import calibrations
from turbofit.planning.request import PlanRequest
from turbofit.report.views.measured_view import calibration_view
from turbofit.serving import ladder
from turbofit.serving.calibration import learn
from turbofit.serving.engine.launches import PretendReader, pretend_machine
from turbofit.serving.proved import Learned

pytestmark = pytest.mark.usefixtures("state")
PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")


def allocated(size: int, held: int, address: str) -> str:
    return f"A 0 0 -1 {size} {held} {address}\n"


def test_each_step_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any library will do: these events have no traces.
    library = Path(sys.executable).resolve()
    monkeypatch.setattr("turbofit.rehearsal.packages.engine_library", lambda: library)
    gpu = pretend_machine(PLAN, 0).gpus[0]
    others = gpu.used + gpu.late
    path = tmp_path / "timeline"
    engine: Any = SimpleNamespace(group=0, pretended=PretendReader(PLAN, 0, path))
    usage = calibrate.PretendUsageReader(PLAN)
    path.write_text("P context\nA 0 0 -1 nonsense\n")
    with pytest.raises(MachineError):  # and is read again from the beginning
        usage.read(engine)
    text = "P context\n" + allocated(50 * MIB, 50 * MIB, "a1") + "F a1 0\n"
    text += allocated(MIB, MIB, "a2")
    path.write_text(text)
    (loaded,) = usage.read(engine).values()
    assert (loaded.peak, loaded.last) == (others + MIB, others + MIB)
    path.write_text(text + allocated(80 * MIB, 81 * MIB, "a3") + f"F a3 {MIB}\n")
    (worst,) = usage.read(engine).values()
    assert (worst.peak, worst.last) == (others + 81 * MIB, others + MIB)
    # A new start has a timeline of its own.
    engine.pretended = PretendReader(PLAN, 0, tmp_path / "another")
    with pytest.raises(MachineError, match="account cannot be read"):
        usage.read(engine)
    (tmp_path / "another").write_text("P context\n" + allocated(MIB, 2 * MIB, "b1"))
    (again,) = usage.read(engine).values()
    assert again.last == others + 2 * MIB


class Samples(nullcontext):  # type: ignore[type-arg]
    """A `Sampler` whose only samples came at these seconds."""

    def __init__(self, *at: float) -> None:
        super().__init__()
        self.at = at

    def between(self, _: str, begin: float, end: float) -> SampledRange | None:
        inside = [at for at in self.at if begin <= at <= end]
        return SampledRange(peak=MIB, last=MIB) if inside else None


def test_a_gpu_that_answers_no_more_is_not_read_by_its_last_answer(monkeypatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 10.0, sleep=lambda _: None)
    monkeypatch.setattr(calibrate, "time", clock)
    monkeypatch.setattr(calibrate, "memory_now", lambda _: Memory(2 * MIB, MIB, MIB))
    engine: Any = SimpleNamespace(group=0)
    for last, refused in ((9.9, False), (9.0, True)):
        monkeypatch.setattr(calibrate, "Sampler", lambda _, last=last: Samples(1.0, last))
        usage = calibrate.NvmlUsageReader(PLAN)
        usage._since = {0: 0.0}
        if refused:
            with pytest.raises(MachineError, match="did not answer"):
                usage.read(engine)
        else:
            assert usage.read(engine) == {0: SampledRange(peak=MIB, last=MIB)}


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
    assert questions[:2] == ["a small image", "a small text"]
    assert questions[3:] == STEPS[3:]
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


def test_what_was_learned_is_kept_for_plans_on_such_cards() -> None:
    result = calibrate.learned(PLAN, driven().observations, {}, lmdeploy="0.18.0", pretend=False)
    assert result["why_not"] is None
    assert [row["phase"] for row in result["phases"]] == ["context and weights", "cache", *STEPS]
    assert calibrate.calibration_of(PLAN) is None
    machine = calibrations.with_calibrations(PLAN.machine, pretend=False)
    calibrated = replace(PLAN, machine=machine)
    known = calibrate.calibration_of(calibrated)
    assert known is not None
    assert known.lmdeploy == "0.18.0"
    again = calibrate.stored(calibrated)
    assert again["phases"] == result["phases"]
    assert "PRETEND" not in str(calibration_view(again))
    pretended = str(calibration_view({**again, "pretend": True}))
    assert "later plans on pretend GPUs know it" in pretended


def test_what_was_calibrated_before_is_told_until_it_is_forgotten(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path / "leases"))
    result = calibrate.learned(PLAN, driven().observations, {}, lmdeploy="0.18.0", pretend=True)
    words = ["calibrate", "internvl2-8b", "--on", "1xrtx3090", "--pretend"]
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    assert "calibrated before" in told.err
    assert json.loads(told.out)["phases"] == result["phases"]
    assert main([*words, "--forget"]) == 0
    assert "forgot 1 documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "given", "chosen"),
    [
        (False, {}, 2),
        (True, {}, 1),
        (True, {"again": True}, 2),
        (False, {"apart": True}, 1),
        (False, {"pretend": True}, 1),
    ],
)
def test_speeds_are_measured_before_the_engines_start_and_planned_with(
    measured: bool, given: dict[str, bool], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StartedError(Exception):
        pass

    def begin() -> None:
        raise StartedError

    plans: list[str] = []
    run = SimpleNamespace(
        choose=lambda: plans.append("made") or PLAN, refuse=lambda: PLAN, begin=begin
    )
    monkeypatch.setattr(calibrate, "Run", lambda *_, **__: run)
    monkeypatch.setattr(calibrate, "is_measured", lambda *_: measured)
    asked: list[Any] = []
    monkeypatch.setattr(calibrate, "measure_speeds", lambda _, gpus, __: asked.append(gpus) or True)
    config: Any = SimpleNamespace(
        pretend=given.get("pretend", False), plan=PLAN, request=PlanRequest(model="m", on="1xl4")
    )
    again, apart = given.get("again", False), given.get("apart", False)
    with pytest.raises(StartedError):
        calibrate.calibrate(config, SimpleNamespace(), print, again=again, apart=apart)
    assert (len(plans), asked) == (chosen, [[0]] * (chosen - 1))


def test_what_restarts_learned_is_dropped_only_where_something_was_missing() -> None:
    file = ladder.learned_file(PLAN, "0.18.0", pretend=False)
    file.write(Learned(changes={"margin": 7}))
    less = {"calibrations": [{"context": -5, "buffers": 3}], "kept": ["file"]}
    more = {"calibrations": [{"context": -5, "buffers": 9}], "kept": ["file"]}
    assert not calibrate.relieve(PLAN, less, "0.18.0", pretend=False)
    assert not calibrate.relieve(PLAN, {**more, "kept": []}, "0.18.0", pretend=False)
    assert not calibrate.relieve(PLAN, more, "0.18.0", pretend=True)
    assert ladder.recall(PLAN, "0.18.0", pretend=False) == {"margin": 7}
    assert calibrate.relieve(PLAN, more, "0.18.0", pretend=False)
    assert ladder.recall(PLAN, "0.18.0", pretend=False) == {}


def test_what_was_measured_is_told_where_nothing_is_learned(monkeypatch) -> None:
    """The disk does not take it, or somebody else's memory moved."""
    seen = driven().observations

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def moved(_: Any) -> Any:
        return SimpleNamespace(used=200 * MIB)

    for place, answer, before, told in (
        ("turbofit.core.process.files._created", full, {}, "cannot be written: No space left"),
        ("turbofit.measure.calibrate.memory_now", moved, {0: 0}, "200 MiB more in use than before"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, answer)
            result = calibrate.learned(PLAN, seen, before, lmdeploy="0.18.0", pretend=False)
        assert told in result["why_not"]
        assert result["kept"] == []
        assert result["calibrations"]
        assert calibrations.recall(pretend=False) == ()
        assert "nothing was learned" in str(calibration_view(result))


def test_steps_are_timed_once_for_each_kind_of_cards_and_kept(monkeypatch) -> None:
    steps = MeasuredSteps(quant_policy=0, points=(StepPoint(sequences=1, cached=64, seconds=0.01),))
    asked: list[object] = []

    class Timer:
        def __init__(self, *words: object) -> None:
            asked.append(words[2:])

        def measure(self, _: object) -> MeasuredSteps:
            return steps

    monkeypatch.setattr(calibrate, "StepTimer", Timer)
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

    monkeypatch.setattr(calibrate, "StepTimer", Timer)
    one = engine()
    one.pretended, one.url, one.client = None, "http://engine", SimpleNamespace(key=None)
    drive(calibrator, one)
    assert calibrator.observations[0].steps is None
    assert told[-1] == "warning: no step is kept: timed steps contradict each other: …"
