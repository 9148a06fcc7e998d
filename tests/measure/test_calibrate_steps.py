"""The steps that `calibrate` times, on an engine whose time is a table that no formula makes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any, TypeVar

import aiohttp
import pytest
from msgspec.structs import replace

import turbofit
from tests.sweep import sweep
from turbofit.core.errors import UsageError
from turbofit.core.images.rule import DummyImage
from turbofit.core.machine import Calibration, Machine, MeasuredSteps, StepPoint
from turbofit.core.plan import Plan
from turbofit.measure import calibrate_steps
from turbofit.measure.calibrate_steps import EngineAddress, StepTimer
from turbofit.memory.calibrated import identity
from turbofit.memory.engines import engine_of
from turbofit.planning.speed import group_rates, rates
from turbofit.rehearsal.plan_clock import step_table
from turbofit.rehearsal.pretend.clock import StepTable

T = TypeVar("T")
OPTIONS: dict[str, Any] = {
    "engine": "turbomind", "max_batch_size": 128, "max_prefill_token_num": 4096,
}  # fmt: skip
PLAN = turbofit.plan("internvl2-2b", on="1xrtx3090", **OPTIONS)
_ADDRESS = EngineAddress("http://none", "m")


class Sequence:
    """A request in the simulated engine: its prompt until it is read, and what it is still owed."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.units = body.get("units", 0)
        self.prompt = body.get("tokens") or len(body["input_ids"])
        self.left, self.length, self.read = body["max_tokens"], self.prompt, False
        self.pieces: list[float] = []
        self.some, self.ended = asyncio.Event(), asyncio.Event()


class Engine(StepTimer):
    """A timer whose requests reach a simulated scheduler in place of HTTP; its time is a table's.

    The scheduler reads prompts first come, first served, beside one token of each answer, as
    TurboMind does. ``jitter`` multiplies each forward's seconds.
    """

    def __init__(self, plan: Plan, table: StepTable, jitter: Any = lambda: 1.0) -> None:
        super().__init__(plan, plan.engines[0], _ADDRESS, None)
        self.table, self.now, self.jitter = table, 0.0, jitter
        self.most = engine_of(plan).forward_tokens(plan.engines[0].settings)
        self.at_once: list[Sequence] = []
        self.running: asyncio.Future[None] | None = None

    @contextmanager
    def added(self, body: dict[str, Any]) -> Iterator[Sequence]:
        """A request until its client has all of the answer, or leaves."""
        sequence = Sequence(body)
        self.at_once.append(sequence)
        if self.running is None or self.running.done():
            self.running = asyncio.ensure_future(self.run())
        try:
            yield sequence
        finally:
            if sequence in self.at_once:
                self.at_once.remove(sequence)

    async def run(self) -> None:
        while self.at_once:
            for _ in range(3):  # clients take what came, and send what follows
                await asyncio.sleep(0)
            self.forward()

    def forward(self) -> None:
        answers = [one for one in self.at_once if one.read]
        prompts, room = [], self.most - len(answers)
        for one in self.at_once:
            if not one.read and one.prompt <= room:
                prompts.append(one)
                room -= one.prompt
        seconds = self.table.forward[self.most - room]
        seconds += sum(one.length for one in answers) * self.table.context
        seconds += sum(one.prompt**2 / 2 for one in prompts) * self.table.pair
        seconds += sum(self.table.image[one.units] for one in prompts if one.units)
        self.now += seconds * self.jitter()
        for one in (*answers, *prompts):
            one.read, one.length, one.left = True, one.length + 1, one.left - 1
            one.pieces.append(self.now)
            one.some.set()
            if not one.left:
                one.ended.set()
                self.at_once.remove(one)

    async def _ask(self, body: dict[str, Any], path: str = "/generate") -> int:
        if path == "/v1/chat/completions":
            rule, limit = self._plan.model.image_rule, self._plan.promise.limits.image_limit
            assert rule is not None
            units, tokens = rule.units(*self.size, limit), rule.tokens(*self.size, limit) + 40
            body = {**body, "units": units, "tokens": tokens}
        with self.added(body) as sequence:
            await sequence.ended.wait()
            return sequence.prompt

    async def _image(self, units: int, image: DummyImage) -> StepPoint:
        self.size = image.size
        return await super()._image(units, image)

    async def _watch(
        self,
        body: dict[str, Any],
        started: asyncio.Event | None = None,
        enough: asyncio.Event | None = None,
    ) -> list[float]:
        with self.added(body) as sequence:
            while started is not None and len(sequence.pieces) < 6:
                await asyncio.sleep(0)
            if started is None or enough is None:
                await sequence.ended.wait()
                return sequence.pieces
            started.set()
            await enough.wait()
            had = len(sequence.pieces)
            while len(sequence.pieces) == had:
                await asyncio.sleep(0)
            return sequence.pieces


def timed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> MeasuredSteps:
    clock = SimpleNamespace(perf_counter=lambda: engine.now, monotonic=lambda: engine.now)
    monkeypatch.setattr(calibrate_steps, "time", clock)
    return engine.measure(lambda _: None)


def strange(table: StepTable) -> StepTable:
    """Half the bandwidth; from 32 tokens of a forward on, a step of half as much again."""
    forward = [
        2 * seconds if tokens < 32 else 3 * seconds for tokens, seconds in enumerate(table.forward)
    ]
    image = [1.7 * seconds for seconds in table.image]
    return StepTable(forward, image, pair=3 * table.pair, context=2 * table.context)


def with_steps(plan: Plan, steps: MeasuredSteps) -> Calibration:
    settings = plan.engines[0].settings
    return Calibration(
        model=identity(plan.model), engine=plan.backend.name, engine_version=plan.backend.version,
        lmdeploy="0.18.0", gpus=tuple(gpu.name for gpu in plan.machine.gpus),
        driver=str(plan.machine.driver), communicator=settings.communicator,
        when="2026-11-29T21:00:00+00:00", context=0, buffers=0, free=0, steps=steps,
    )  # fmt: skip


def test_the_table_of_an_engine_is_found_also_one_that_no_formula_makes(monkeypatch) -> None:
    table = strange(step_table(PLAN, PLAN.engines[0]))
    steps = timed(Engine(PLAN, table), monkeypatch)
    assert "longer prompts: not reached: one forward reads 4,222 tokens" in steps.left_out
    assert {one.sequences for one in steps.points} >= {1, 2, 4, 8, 16, 32, 128}
    assert {one.prompt for one in steps.points if not one.units} >= {256, 1024, 4096}
    assert {one.units for one in steps.points} == {0, 1, 3, 5, 7, 13}
    assert {one.sequences for one in steps.points if one.prompt} == {1, 8, 32}
    assert len(steps.points) >= 37
    for point in steps.points:
        assert point.seconds == pytest.approx(table.seconds(point), rel=0.03), point
    # A plan with these steps has their seconds, and so has the clock.
    machine = replace(PLAN.machine, calibrations=(with_steps(PLAN, steps),))
    found = step_table(replace(PLAN, machine=machine), PLAN.engines[0])
    for point in steps.points:
        assert found.seconds(point) == pytest.approx(table.seconds(point), rel=0.03), point


def slower(machine: Machine) -> Machine:
    """The machine with cards that are 40 % slower."""
    gpus = tuple(
        replace(
            gpu,
            memory_bandwidth=int(0.6 * gpu.memory_bandwidth),  # type: ignore[operator]
            dense_flops=int(0.6 * gpu.dense_flops),  # type: ignore[operator]
        )
        for gpu in machine.gpus
    )
    return replace(machine, gpus=gpus)


def test_a_slower_card_is_forecast_as_slow_once_it_was_timed(monkeypatch) -> None:
    slow = turbofit.plan("internvl2-2b", on=slower(PLAN.machine), **OPTIONS)
    steps = timed(Engine(slow, step_table(slow, slow.engines[0])), monkeypatch)
    machine = replace(PLAN.machine, calibrations=(with_steps(PLAN, steps),))
    after = turbofit.plan("internvl2-2b", on=machine, **OPTIONS)
    told, true = after.throughput, slow.throughput
    assert "steps as measured here on 2026-11-29" in told.basis
    assert PLAN.throughput.requests_per_second > 1.3 * true.requests_per_second
    for name in ("requests_per_second", "seconds_to_first_token_alone"):
        assert getattr(told, name) == pytest.approx(getattr(true, name), rel=0.05)


OTHERS = [
    ("1xrtx3090", "internvl2-2b", "internvl2-8b"),
    ("1xa100-80g", "internvl2-8b", "internvl2-2b"),
    ("1xh100", "internvl2-8b", "qwen2.5-7b"),
]


# in the check each factor and each card once
@pytest.mark.parametrize(("launches", "names"), sweep(product((0.5, 1.0, 1.5), OTHERS), 4))
def test_another_model_on_the_slower_card_is_forecast_by_its_rates(
    monkeypatch, launches: float, names: tuple[str, str, str]
) -> None:
    """Within 5 %, also where launches take half of what the constants say, or half as much again.

    The plan of the other model, and the clock's table of it, are those of the slow card.
    """
    card, other, model = names
    of_other = turbofit.plan(other, on=card, engine="turbomind")
    slow = slower(of_other.machine)
    timed_plan = turbofit.plan(other, on=slow, engine="turbomind")
    plain = rates()
    given = replace(
        plain, layer_seconds=launches * plain.layer_seconds,
        step_seconds=launches * plain.step_seconds,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("turbofit.planning.speed.rates", lambda: given)
        patch.setattr("turbofit.rehearsal.plan_clock.rates", lambda: given)
        engine = Engine(timed_plan, step_table(timed_plan, timed_plan.engines[0]))
        true = turbofit.plan(model, on=slow, engine="turbomind")
        table = step_table(true, true.engines[0])
    steps = timed(engine, monkeypatch)
    machine = replace(of_other.machine, calibrations=(with_steps(of_other, steps),))
    before = turbofit.plan(model, on=of_other.machine, engine="turbomind").throughput
    told = turbofit.plan(model, on=machine, engine="turbomind").throughput
    assert "as measured here on 2026-11-29 with" in told.basis
    assert "another model" in told.basis
    for name in ("requests_per_second", "seconds_to_first_token_alone"):
        wanted = getattr(true.throughput, name)
        assert getattr(told, name) == pytest.approx(wanted, rel=0.05), name
        assert getattr(before, name) != pytest.approx(wanted, rel=0.1), name
    found = step_table(replace(true, machine=machine), true.engines[0])
    for tokens in (1, 16, 512, 4096):
        assert found.forward[tokens] == pytest.approx(table.forward[tokens], rel=0.2), tokens
    assert found.context == pytest.approx(table.context, rel=0.05)


def test_steps_hold_for_their_model_card_and_keys_alone(monkeypatch) -> None:
    steps = timed(Engine(PLAN, strange(step_table(PLAN, PLAN.engines[0]))), monkeypatch)
    steps = replace(steps, rates=())
    kept, settings = with_steps(PLAN, steps), PLAN.engines[0].settings

    def seconds(plan: Plan, calibration: Calibration, quant_policy: int = 0) -> float:
        machine = replace(plan.machine, calibrations=(calibration,))
        changed = replace(settings, quant_policy=quant_policy)
        group = group_rates(plan.model, changed, machine, list(machine.gpus), engine_of(plan))
        return group.seconds(rates(), 1)

    plain = seconds(PLAN, replace(kept, steps=None))
    assert seconds(PLAN, kept) == pytest.approx(2 * plain, rel=0.03)
    assert seconds(PLAN, replace(kept, gpus=("NVIDIA L4",))) == plain
    assert seconds(PLAN, kept, 8) == seconds(PLAN, replace(kept, steps=None), 8)
    other = turbofit.plan("internvl2-1b", on="1xrtx3090", engine="turbomind")
    assert seconds(other, kept) == seconds(other, replace(kept, steps=None))


def test_what_is_no_step_is_left_out(monkeypatch) -> None:
    uneven = iter([1.0, 3.0, 0.2, 1.7] * 100_000)
    engine = Engine(PLAN, step_table(PLAN, PLAN.engines[0]), lambda: next(uneven))
    steps = timed(engine, monkeypatch)
    assert not any(point.sequences > 1 for point in steps.points)
    assert any("too much for steps" in text for text in steps.left_out)


def test_an_engine_that_does_not_answer_leaves_points_out(monkeypatch) -> None:
    class Silent(Engine):
        async def _watch(
            self, body: dict[str, Any], started: asyncio.Event | None = None, *_: Any
        ) -> list[float]:
            if started is not None:
                started.set()
            raise aiohttp.ServerDisconnectedError

    steps = timed(Silent(PLAN, step_table(PLAN, PLAN.engines[0])), monkeypatch)
    assert not steps.points
    assert "1 sequence of 64 tokens: no answer (ServerDisconnectedError)" in steps.left_out


def test_after_a_failed_answer_none_of_its_reading_runs_on(monkeypatch) -> None:
    """An answer of the last reading would make every forward of the next one longer."""

    class Failing(Engine):
        asked = unended = 0

        async def _ask(self, *args: Any) -> int:
            self.asked += 1
            return await self.counted(super()._ask(*args), fails=self.asked % 7 == 0)

        async def _watch(self, *args: Any) -> list[float]:
            return await self.counted(super()._watch(*args), fails=False)

        async def counted(self, answer: Coroutine[Any, Any, T], *, fails: bool) -> T:
            self.unended += 1
            try:
                if fails:
                    await asyncio.sleep(0)  # the others have begun
                    answer.close()
                    raise aiohttp.ServerDisconnectedError
                return await answer
            finally:
                self.unended -= 1

    engine = Failing(PLAN, step_table(PLAN, PLAN.engines[0]))
    clock = SimpleNamespace(perf_counter=lambda: engine.now, monotonic=lambda: engine.now)
    monkeypatch.setattr(calibrate_steps, "time", clock)
    before = dict[str, int]()
    steps = engine.measure(lambda what: before.update({what: engine.unended}))
    failed = [text.partition(":")[0] for text in steps.left_out if "Disconnected" in text]
    assert {text.split()[-2] for text in failed} >= {"vision", "64", "2,048"}
    assert {*before.values()} == {0}


def test_no_point_begins_after_its_time(monkeypatch) -> None:
    slow = strange(step_table(PLAN, PLAN.engines[0]))
    slow = slow._replace(forward=[1.0] * len(slow.forward))
    steps = timed(Engine(PLAN, slow), monkeypatch)
    assert any("180 s had passed" in text for text in steps.left_out)


def test_points_that_contradict_each_other_are_refused(monkeypatch) -> None:
    class Wild(Engine):
        async def _prompt(self, tokens: int, answers: int = 1) -> StepPoint:
            point = await super()._prompt(tokens, answers)
            return replace(point, seconds=point.seconds / (50 if tokens == 4096 else 1))

    engine = Wild(PLAN, step_table(PLAN, PLAN.engines[0]))
    with pytest.raises(UsageError, match=r"contradict each other: a prompt of 4,096 tokens took"):
        timed(engine, monkeypatch)
