"""What became of a plan, and a server that runs."""

from __future__ import annotations

from msgspec.structs import replace

from tests.report.documents import planned, served_run
from turbofit import api
from turbofit.core.rehearsal import Moment, Rehearsal, RehearsedCache
from turbofit.core.run_report import (
    RUN_SCHEMA,
    EngineRecord,
    RunAttempt,
    RunEvent,
    RunFigure,
    RunReport,
)
from turbofit.core.units import MIB, format_bytes
from turbofit.observe.live import LiveEngine, LiveServer
from turbofit.report.painters.document import Table
from turbofit.report.painters.terminal import paint
from turbofit.report.views.run_view import became_blocks, sides, watch_view


def run_of(*engines: EngineRecord, pretend: bool = False) -> RunReport:
    attempt = RunAttempt(started="", engines=engines)
    return RunReport(
        schema=RUN_SCHEMA, turbofit_version="", started="", state="", pretend=pretend,
        attempts=(attempt,),
    )  # fmt: skip


def rehearsal(kept: RehearsedCache, *timeline: Moment) -> Rehearsal:
    return Rehearsal(
        outcome="served", seconds=1.0, engine_version="0.18.0", cases=(), cache=kept, death=None,
        timeline=timeline,
    )  # fmt: skip


def test_a_run_beside_its_forecast() -> None:
    plan = planned("text only")
    ((_, rows),) = sides(plan, served_run(plan))
    found = {row.what: row for row in rows}
    assert found["in use in the worst case"].measured == plan.gpus[0].peak - MIB
    assert found["KV cache"].measured == plan.kv.region_bytes + MIB
    for pretend, title in ((False, "measured"), (True, "pretend run")):
        blocks = became_blocks(plan, served_run(plan, pretend=pretend))
        table = next(block for block in blocks if isinstance(block, Table))
        assert [column.title for column in table.columns[1:3]] == ["forecast", title]


def test_groups_that_differ_are_told_by_their_own() -> None:
    plan = planned("mixed cards")
    kept = RehearsedCache(free=(1,), region=(2,), object_size=None, slab_size=None, tokens=7)
    seen = rehearsal(kept, Moment(phase="ready", peak=(5,), end=(4,)))
    group_plans = tuple(replace(one, rehearsal=seen) for one in plan.by_group)
    told = sides(replace(plan, rehearsal=seen, by_group=group_plans))
    assert len(told) == 2
    tokens = [row.forecast for _, rows in told for row in rows if row.what == "KV tokens"]
    assert tokens == [one.kv.tokens for one in plan.by_group]
    assert len(set(tokens)) == 2
    assert [row.rehearsed for _, rows in told for row in rows if row.what == "in use at rest"] == [
        4, 4,
    ]  # fmt: skip


def test_equal_cards_show_the_worst_that_any_of_them_measured() -> None:
    plan = api.plan("internvl2-8b", on="4xrtx3090", tp=1)
    ledger = plan.gpus[0]

    def engine(group: int, over: int, tokens: int) -> EngineRecord:
        used = RunFigure(
            what="in use at most", forecast=ledger.peak, actual=ledger.peak + over, gpu=group
        )
        cache = RunFigure(what="KV tokens", forecast=tokens, actual=tokens, unit="tokens")
        return EngineRecord(group=group, beside=(used, cache))

    run = run_of(engine(0, -MIB, 900), engine(2, 900 * MIB, 900), engine(3, -MIB, 700))
    ((title, rows),) = sides(plan, run)
    assert title == "GPU 0-3, the worst of them"
    measured = {row.what: row.measured for row in rows}
    assert measured == {"KV tokens": 700, "in use in the worst case": ledger.peak + 900 * MIB}


def test_equal_cards_show_the_worst_that_any_of_them_rehearsed() -> None:
    plan = api.plan("internvl2-8b", on="2xrtx3090", tp=2)
    first = plan.gpus[0]
    second = replace(first, index=1)
    terms = tuple(replace(term, rehearsed=term.bytes) for term in first.ledger)
    more = tuple(replace(term, rehearsed=term.bytes + MIB) for term in first.ledger)
    kept = RehearsedCache(free=(9, 8), region=(7, 6), object_size=None, slab_size=None, tokens=5)
    peak = first.peak
    seen = rehearsal(
        kept,
        Moment(phase="ready", peak=(4, 4), end=(3, 5)),
        Moment(phase="case vision_request", peak=(peak - MIB, peak + 900 * MIB), end=(3, 5)),
    )
    gpus = (replace(first, ledger=terms), replace(second, ledger=more))
    ((title, rows),) = sides(replace(plan, gpus=gpus, rehearsal=seen))
    assert title == "GPU 0-1, the worst of them"
    found = {row.what: row for row in rows}
    assert found["in use in the worst case"].rehearsed == peak + 900 * MIB
    assert found["in use at rest"].rehearsed == 5
    assert found["KV cache"].rehearsed == 6
    weights = next(row for row in rows if row.what.startswith("weights"))
    assert (weights.rehearsed or 0) - (weights.forecast or 0) == MIB


def test_a_group_that_was_rehearsed_is_told_whichever_its_cards_are() -> None:
    plan = planned("served")
    gpus = tuple(replace(plan.gpus[0], index=index) for index in (0, 1))
    shape = replace(plan.parallel, replicas=2, groups=((1,), (0,)))
    ((title, rows),) = sides(replace(plan, gpus=gpus, parallel=shape))
    assert title == "GPU 0-1"
    assert any(row.rehearsed is not None for row in rows)


def test_the_most_of_a_run_stands_beside_that_of_loading_where_loading_needs_most() -> None:
    plan = api.predict("internvl2-8b", on="1xrtx4090", cache_max_entry_count=0.1)
    ledger = plan.gpus[0]
    assert ledger.load_peak > ledger.peak
    seen = RunFigure(what="in use at most", forecast=ledger.most, actual=ledger.most, gpu=0)
    ((_, (row,)),) = sides(plan, run_of(EngineRecord(group=0, beside=(seen,)), pretend=True))
    assert row.what == "in use at most, loading included"
    assert row.forecast == row.measured == ledger.most
    # And a server that loads is not over it.
    told = " ".join(paint(watch_view(plan, RUN, None, None, {0: ledger.load_peak})).split())
    assert f"{format_bytes(ledger.load_peak)} at most" in told
    assert " over;" not in told


PLAN = api.plan("internvl2-8b", on="2xrtx3090")
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
    run: RunReport, now: LiveServer | None, before: LiveServer | None = None, **used: int
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
