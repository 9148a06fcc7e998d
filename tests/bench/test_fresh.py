"""The sheet by which somebody judges answers to fresh reports, and its count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.faults.fresh import count, main, sheet

REPORT = {
    "at": "https://example.org/issues/1", "query": "lmdeploy out of memory",
    "log": "lmdeploy\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.\n",
    "truth": "the card was full",
}  # fmt: skip


def test_a_sheet_has_the_answer_and_no_verdict(tmp_path: Path) -> None:
    reports, out = tmp_path / "reports.yaml", tmp_path / "sheet.yaml"
    reports.write_text(yaml.safe_dump([REPORT]))
    assert main(["sheet", str(reports), str(out)]) == 0
    (row,) = yaml.safe_load(out.read_text())
    assert row["answer"]["kind"] == "out_of_memory"
    assert {name: row[name] for name in REPORT} == REPORT
    with pytest.raises(ValueError, match="the verdict is one of"):
        count([row])


@pytest.mark.parametrize("reports", [[REPORT, REPORT], [{**REPORT, "truth": ""}]])
def test_a_report_is_whole_and_stands_once(reports: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="issues/1"):
        sheet(reports)


@pytest.mark.parametrize(
    ("right", "wrong", "silent", "named", "met"),
    [(30, 2, 8, 10, True), (29, 2, 9, 10, False), (35, 3, 2, 10, False), (40, 0, 0, 9, False)],
)
def test_the_bars_of_forty_reports_and_ten_foreign_logs(
    right: int, wrong: int, silent: int, named: int, *, met: bool
) -> None:
    verdicts = ["right"] * right + ["wrong"] * wrong + ["silent"] * silent
    judged = [{"at": "x", "verdict": verdict} for verdict in verdicts]
    foreign = ["right"] * named + ["wrong"] * (10 - named)
    judged += [{"at": "y", "verdict": verdict, "foreign": True} for verdict in foreign]
    row, done = count(judged)
    assert done is met
    assert row.startswith(f"| 40 | {right} (")
    assert f"{named} of 10 foreign logs" in row
