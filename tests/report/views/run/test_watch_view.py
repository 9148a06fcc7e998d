from __future__ import annotations

from msgspec.structs import replace

import turbofit.api
from turbofit.core.run_report import RunEvent, RunReport
from turbofit.core.units import format_bytes
from turbofit.observe.live import LiveEngine, LiveServer
from turbofit.report.painters.terminal import paint
from turbofit.report.views.run_view import watch_view

PLAN = turbofit.api.plan("internvl2-8b", on="2xrtx3090")
ENGINE = LiveEngine(
    index=0, up=True, in_flight=3, units=39, running=3, cache_used=0.5,
    prompt_tokens=10_000, generated_tokens=700,
)  # fmt: skip
NOW = LiveServer(
    waiting=2, engines=(ENGINE, LiveEngine(index=1, up=False, in_flight=0, units=0)), requests=12,
    limited={"max_dynamic_patch": 5}, refused={"images": 1}, failures=1,
)  # fmt: skip
RUN = RunReport(
    schema="turbofit.run/1", turbofit_version="0", started="today", state="ready",
    urls=("http://127.0.0.1:23333",),
    events=(RunEvent(at="now", kind="warning", text="who[1] grew"),),
)  # fmt: skip


def text(
    run: RunReport | None, now: LiveServer | None, before: LiveServer | None = None, **used: int
) -> str:
    held = {int(name[1:]): size for name, size in used.items()}
    looked = (before, 2.0) if before else None
    return paint(watch_view(PLAN, run, now, looked, held))


def test_all_of_it_in_80_columns() -> None:
    told = text(RUN, NOW)
    assert max(map(len, told.splitlines())) <= 80
    for part in ("ready", "23333", "2 requests waiting", "5 x max_dynamic_patch", "1 x images",
                 "who[1] grew", "1 that an engine did not finish"):  # fmt: skip
        assert part in told
    (first, second) = (line.split() for line in told.splitlines() if line[2:4] in ("0 ", "1 "))
    assert first == ["0", "yes", "3", "39", "3", "50%", "-", "-"]
    assert second[:2] == ["1", "no"]


def test_rates_are_between_two_looks() -> None:
    then = replace(NOW, engines=(replace(ENGINE, prompt_tokens=8_000, generated_tokens=500),))
    assert "1,000           100" in text(RUN, NOW, then)
    # One that was started again counts from 0.
    restarted = replace(NOW, engines=(replace(ENGINE, generated_tokens=9_000),))
    (row,) = (line for line in text(RUN, NOW, restarted).splitlines() if line.startswith("  0 "))
    assert row.split()[-1] == "350"


def test_memory_beside_the_forecast() -> None:
    gpu = PLAN.gpus[0]
    told = " ".join(text(RUN, None, _0=gpu.steady, _1=gpu.peak + (300 << 20)).split())
    assert "300 MiB over" in told
    assert told.count("in use now") == 2
    assert "in use now" not in text(RUN, None)


def test_loading_is_part_of_the_most_that_is_forecast() -> None:
    plan = turbofit.api.predict("internvl2-8b", on="1xrtx4090", cache_max_entry_count=0.1)
    gpu = plan.gpus[0]
    assert gpu.load_peak > gpu.peak
    told = " ".join(paint(watch_view(plan, RUN, None, None, {0: gpu.load_peak})).split())
    assert f"{format_bytes(gpu.load_peak)} at most" in told
    assert " over;" not in told
