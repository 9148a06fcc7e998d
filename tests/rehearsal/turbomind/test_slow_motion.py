"""What comes before a request's first forward is as slow as the cards."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.rehearsal.pretend.clock import ClockFile, StepTable
from turbofit.rehearsal.turbomind import slow_motion


class App:
    """An ASGI app that works for three seconds before it asks the engine."""

    def __init__(self, clock: FakeTime, engine: Any) -> None:
        self.clock, self.engine = clock, engine

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.clock.now += 3.0
        async with self.engine.safe_run(None, None, input_ids=[1]) as outputs:
            send(outputs)


class Engine:
    """LMDeploy's, as far as a server asks it."""

    @asynccontextmanager
    async def safe_run(self, _handle: Any, _session: Any, **given: Any) -> Any:
        yield given


class FakeTime:
    """A time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("factor", "runs", "waits"), [(4.0, True, 9), (1.0, True, 0), (4.0, 0, 0)])
def test_a_request_waits_as_much_longer_as_the_cards_are_slower(
    factor: float, runs: bool, waits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, clock = FakeTime(), ClockFile(tmp_path / "clock", factor)
    monkeypatch.setattr(slow_motion, "time", SimpleNamespace(monotonic=lambda: passes.now))
    monkeypatch.setattr(slow_motion, "asyncio", SimpleNamespace(sleep=passes.sleep))
    clock.write(StepTable([], [], 0.0, 0.0))
    if runs:
        clock.run()
    app, engine = type("App", (App,), {}), type("Engine", (Engine,), {})
    slow_motion.slow_down(engine, app, clock)
    came: list[Any] = []
    asyncio.run(app(passes, engine())(None, None, came.append))
    assert came == [{"input_ids": [1]}]
    assert passes.now == 103.0 + waits


def test_who_asks_the_engine_without_a_request_does_not_wait(tmp_path: Path) -> None:
    clock = ClockFile(tmp_path / "clock", 1000.0)
    clock.write(StepTable([], [], 0.0, 0.0))
    clock.run()
    engine = type("Engine", (Engine,), {})
    slow_motion.slow_down(engine, type("App", (App,), {}), clock)

    async def ask() -> float:
        async with engine().safe_run(None, None):
            return time.monotonic()

    began = time.monotonic()
    assert asyncio.run(ask()) >= began
