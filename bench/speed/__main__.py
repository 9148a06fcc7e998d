"""``python -m bench.speed [--observations FILE] [--fit] [--write]``: forecasts beside figures."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path

from bench.speed.fit import FITTED, fit, left_out_scores
from bench.speed.forecast import MissingError, Setup, setup_of
from bench.speed.report import Results, published_errors, report, with_errors
from bench.speed.rows import HERE, OBSERVATIONS, Row, read_rows
from bench.speed.score import score
from turbofit.core.presets import preset_path
from turbofit.tuner.speed.rates import rates

__all__ = ["main", "results_of"]


def results_of(rows: list[Row]) -> Results:
    """All rows, each with its source left out and as shipped."""
    setups: list[Setup] = []
    missing: dict[str, str] = {}
    for row in rows:
        try:
            setups.append(setup_of(row))
        except MissingError as exc:  # noqa: PERF203 - each row for itself
            missing[row.id] = str(exc)
    left_out = left_out_scores(setups, rates(FITTED))
    shipped = {one.row.id: score(one, rates()) for one in setups}
    return Results(left_out, [shipped[one.setup.row.id] for one in left_out], missing)


def main(argv: list[str] | None = None) -> int:
    """Run the program; 2 where the file cannot be read or has nothing to score."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--observations", type=Path, default=OBSERVATIONS, metavar="FILE")
    parser.add_argument("--fit", action="store_true", help="constants fitted to all rows")
    parser.add_argument(
        "--write", action="store_true", help="renew RESULTS.md and the errors that plans tell"
    )
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.observations)
    except (OSError, ValueError) as exc:
        print(f"error: {exc}\nhint: one JSON object a line, see rows.py", file=sys.stderr)
        return 2
    results = results_of(rows)
    if not results.judged:
        print("error: no row of LMDeploy can be scored\nhint: see rows.py", file=sys.stderr)
        return 2
    if args.fit:
        found = fit([one for one in results.setups if one.row.of_lmdeploy], rates(FITTED))
        for name in FITTED:
            print(f"{name}: {getattr(found, name):.4g} (shipped {getattr(rates(), name):.4g})")
        return 0
    text = report(results, datetime.now(timezone.utc).date())
    if args.write:
        (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
        path = preset_path("engines", "throughput")
        errors = published_errors(results)
        path.write_text(with_errors(path.read_text(encoding="utf-8"), errors), encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
