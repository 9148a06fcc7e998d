"""``python -m bench.speed [--fit] [--write]``: forecasts beside published figures."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone

from bench.speed.fit import FITTED, fit, left_out_scores
from bench.speed.forecast import setup_of
from bench.speed.report import Results, published_errors, report, with_errors
from bench.speed.rows import HERE, Row, read_rows
from bench.speed.score import score
from turbofit.core.presets import preset_path
from turbofit.tuner.speed import rates


def results_of(rows: list[Row]) -> Results:
    """All rows as shipped; those that fit, with their source left out as well."""
    left_out = left_out_scores([setup_of(row) for row in rows if not row.unseen], rates(FITTED))
    unseen = [setup_of(row) for row in rows if row.unseen]
    return Results(
        left_out,
        [score(one.setup, rates()) for one in left_out],
        [score(one, rates()) for one in unseen],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="constants fitted to all rows")
    parser.add_argument(
        "--write", action="store_true", help="renew RESULTS.md and the errors that plans tell"
    )
    args = parser.parse_args(argv)
    results = results_of(read_rows())
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
    sys.exit(main())
