"""What became of a plan."""

from __future__ import annotations

from tests.report.documents import planned, served_run
from tests.support.plans import changed
from turbofit import api
from turbofit.core.engine_end import Moment, Rehearsal, RehearsedCache
from turbofit.core.run_report import (
    EngineRecord,
    RunAttempt,
    RunFigure,
    RunReport,
)
from turbofit.core.units import MIB
from turbofit.report.painters.document import Table
from turbofit.report.views.run_view import rehearsal_and_run_blocks, sides


def run_of(*engines: EngineRecord, pretend: bool = False) -> RunReport:
    attempt = RunAttempt(started="", engines=engines)
    return RunReport(
        turbofit_version="", started="", state="", pretend=pretend,
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
    assert found["in use in the worst case"].measured == plan.ledgers[0].peak - MIB
    assert found["KV cache"].measured == plan.engines[0].kv.region_bytes + MIB
    for pretend, title in ((False, "measured"), (True, "pretend run")):
        blocks = rehearsal_and_run_blocks(plan, served_run(plan, pretend=pretend))
        table = next(block for block in blocks if isinstance(block, Table))
        assert [column.title for column in table.columns[1:3]] == ["forecast", title]


def test_groups_that_differ_are_told_by_their_own() -> None:
    plan = planned("mixed cards")
    kept = RehearsedCache(free=(1,), region=(2,), object_size=None, slab_size=None, tokens=7)
    seen = rehearsal(kept, Moment(phase="ready", peak=(5,), end=(4,)))
    told = sides(changed(plan, rehearsal=seen))
    assert len(told) == 2
    tokens = [row.forecast for _, rows in told for row in rows if row.what == "KV tokens"]
    assert tokens == [one.kv.tokens for one in plan.engines]
    assert len(set(tokens)) == 2
    assert [row.rehearsed for _, rows in told for row in rows if row.what == "in use at rest"] == [
        4, 4,
    ]  # fmt: skip


def test_equal_cards_show_the_worst_that_any_of_them_measured() -> None:
    plan = api.plan("internvl2-8b", on="4xrtx3090", tp=1)
    ledger = plan.ledgers[0]

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
