"""``python -m bench.accuracy [--observations FILE] [--json] [--write]``.

Without a file, the rows of `rows.jsonl`. ``--write`` renews `rows.jsonl` (the rows of LMDeploy's
engines, in our own format) and `RESULTS.md` from them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.accuracy.report import report
from bench.accuracy.rows import read_rows, write_rows
from bench.accuracy.score import ENGINES, Scored, Unscored, score, summary

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Run the program; 2 where the file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--observations", type=Path, default=HERE / "rows.jsonl", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--write", action="store_true", help="renew rows.jsonl and RESULTS.md")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.observations)
    except (OSError, ValueError) as exc:
        print(f"error: {exc}\nhint: one JSON object a line, as in rows.jsonl", file=sys.stderr)
        return 2
    if args.write:
        rows = [row for row in rows if row.engine in ENGINES]
        write_rows(HERE / "rows.jsonl", rows)
    scored, unscored = score(rows)
    if args.write:
        (HERE / "RESULTS.md").write_text(report(scored, unscored))
    if args.json:
        print(json.dumps(as_json(scored, unscored), indent=2))
    elif not args.write:
        print(report(scored, unscored), end="")
    return 0


def as_json(scored: list[Scored], unscored: list[Unscored]) -> dict[str, Any]:
    """The document of ``--json``."""
    rows = [line for one in scored for line in _lines(one)]
    return {
        "rows": rows,
        "unscored": [{"id": one.row.id, "missing": one.missing} for one in unscored],
        "summary": summary(scored, unscored),
    }


def _lines(one: Scored) -> Iterator[dict[str, Any]]:
    """One line a figure; a row without figures has one for its outcome."""
    outcomes = {"outcome_forecast": one.forecast.outcome, "outcome_observed": one.observed}
    if not one.scores:
        keys = ("unit", "forecast", "observed", "error_mib", "error_pct_of_card")
        yield {"id": one.row.id, "figure": "outcome", **dict.fromkeys(keys), **outcomes}
    for s in one.scores:
        yield {
            "id": one.row.id,
            "figure": s.figure,
            "unit": s.unit,
            "forecast": round(s.forecast, 3),
            "observed": s.observed,
            "error_mib": _rounded(s.error_mib),
            "error_pct_of_card": _rounded(s.percent_of_card),
            **outcomes,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


if __name__ == "__main__":
    sys.exit(main())
