"""`bench/accuracy`: scores of rows, and RESULTS.md from the rows beside it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from bench.accuracy.__main__ import main
from bench.accuracy.rows import HERE, Row, read_rows
from bench.accuracy.score import score, summary

ROWS = {row.id: row for row in read_rows()}
TABLE = Row(
    id="table", source="a documentation's table (of 2024)", engine="turbomind", version="0.5.2",
    model="internvl2-8b", on="1xa100-80g", settings={"cache_max_entry_count": 0.2},
    figures={"used_mib": 30624}, outcome="ran",
)  # fmt: skip
BLOCKS = Row(
    id="blocks", source="owner/repo#1", engine="turbomind", version="0.8.0", model="internvl2-8b",
    on="4xrtx3090", tp=4, settings={"cache_max_entry_count": 0.8}, free_mib=2780,
    figures={"block_mib": 2.0, "blocks": 1112}, outcome="oom",
)  # fmt: skip
TOO_LARGE = Row(
    id="too-large", source="owner/repo#2", engine="turbomind", version="0.5.2.post1",
    model="internvl2-40b-awq", on="1xrtx4090", quant_policy=4, outcome="oom", phase="load",
    settings={"cache_max_entry_count": 0.8, "session_len": 500},
)  # fmt: skip


def scores(row: Row) -> dict[str, tuple[float, float]]:
    """Forecast and observed, by figure."""
    ((scored,), _) = score([row])
    return {one.figure: (one.forecast, one.observed) for one in scored.scores}


def test_figures_are_put_beside_what_the_account_says() -> None:
    forecast, observed = scores(TABLE)["used"]
    assert observed == 30624
    assert forecast == pytest.approx(observed, rel=0.02)
    assert scores(BLOCKS) == {"block": (2, 2), "blocks": (1112, 1112)}
    assert scores(replace(BLOCKS, not_empty="it held others")) == {"block": (2, 2)}


def test_a_miss_is_counted_with_its_sign() -> None:
    errors = summary(*score([replace(TABLE, figures={"used_mib": 40000})]))["by_source"]
    (found,) = errors.values()
    assert found["worst_mib"] < -9000
    assert found["worst_percent"] == found["median_signed_percent"] < -10


def test_contradicted_outcomes_are_named_but_for_cards_that_nobody_named() -> None:
    swapped = [replace(TABLE, outcome="oom"), replace(TOO_LARGE, outcome="ran")]
    assert summary(*score(swapped))["wrong_outcomes"] == ["table", "too-large"]
    unknown = [replace(row, card_known=False) for row in swapped]
    assert summary(*score(unknown))["wrong_outcomes"] == []


def test_every_row_has_a_source_and_a_forecast_or_a_reason() -> None:
    assert len(ROWS) == len(read_rows()) > 100
    for row in ROWS.values():
        assert row.source
        assert bool(row.missing) != bool(row.model and row.on and row.version)


def test_results_come_from_the_rows_beside_them(capsys) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert (HERE / "RESULTS.md").read_text() == printed, "run python -m bench.accuracy --write"


def test_bars_hold() -> None:
    scored, unscored = score(list(ROWS.values()))
    facts = summary(scored, unscored)
    assert facts["share_scored"] >= 0.9
    table = [
        abs(s.percent_of_card or 0)
        for one in scored
        if "internvl2.0" in one.row.source and one.row.engine == "turbomind"
        for s in one.scores
    ]
    assert len(table) >= 20
    assert sorted(table)[len(table) // 2] <= 1
    assert max(table) <= 3
    for block in facts["blocks"]:
        limit = 0 if block["figure"] == "block" else 2
        assert abs(block["error_percent"]) <= limit
