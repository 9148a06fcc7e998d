"""LMDeploy's server on pretend GPUs: how it is started, and its slow motion before a forward."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.rehearsal.pretend.clock import ClockFile, StepTable
from turbofit.rehearsal.turbomind import server


class App:
    """An ASGI app that works for three seconds before it takes a handle."""

    def __init__(self, clock: FakeTime, pool: Any) -> None:
        self.clock, self.pool = clock, pool

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.clock.now += 3.0
        send(await self.pool.get())


class Pool:
    """LMDeploy's pool, whose next handle is free after some seconds."""

    def __init__(self, clock: FakeTime, busy: float) -> None:
        self.clock, self.busy = clock, busy

    async def get(self) -> str:
        self.clock.now += self.busy
        return "handle"


class FakeTime:
    """A time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("busy", [0.0, 50.0])
@pytest.mark.parametrize(("factor", "runs", "waits"), [(4.0, True, 9), (1.0, True, 0), (4.0, 0, 0)])
def test_a_request_waits_as_much_longer_as_the_cards_are_slower_and_no_longer_for_a_handle(
    factor: float, runs: bool, waits: float, busy: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    passes, clock = FakeTime(), ClockFile(tmp_path / "clock", factor)
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: passes.now))
    monkeypatch.setattr(server, "asyncio", SimpleNamespace(sleep=passes.sleep))
    clock.write(StepTable([], [], 0.0, 0.0))
    if runs:
        clock.run()
    app, pool = type("App", (App,), {}), type("Pool", (Pool,), {})
    server.slow_down(pool, app, clock)
    came: list[Any] = []
    asyncio.run(app(passes, pool(passes, busy))(None, None, came.append))
    assert came == ["handle"]
    assert passes.now == 103.0 + waits + busy


def test_who_asks_the_engine_without_a_request_does_not_wait(tmp_path: Path) -> None:
    clock, passes = ClockFile(tmp_path / "clock", 1000.0), FakeTime()
    clock.write(StepTable([], [], 0.0, 0.0))
    clock.run()
    pool = type("Pool", (Pool,), {})
    server.slow_down(pool, type("App", (App,), {}), clock)
    assert asyncio.run(pool(passes, 0.0).get()) == "handle"


def test_a_server_that_is_started_alone_says_how_it_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TURBOFIT_PRETEND_MACHINE", raising=False)
    assert server.main(["serve"]) == 2
    assert "turbofit serve --pretend" in capsys.readouterr().err
    assert "LD_PRELOAD" not in os.environ
