"""``python -m bench.speed [--fit] [--write]``: forecasts beside published figures."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone

from bench.speed.fit import FITTED, fit, left_out_scores
from bench.speed.forecast import setup_of
from bench.speed.report import Results, report
from bench.speed.rows import HERE, Row, WithdrawnError, read_rows
from bench.speed.score import score
from bench.speed.sureties import surety_file
from turbofit.core.presets import preset_path
from turbofit.planning.speed import rates


def results_of(rows: list[Row]) -> Results:
    """Score all rows as shipped, and rows of text also with their source left out of the fit."""
    text, unseen, images = (
        [setup_of(row) for row in rows if not row.sizes and not row.unseen],
        [setup_of(row) for row in rows if row.unseen],
        [setup_of(row) for row in rows if row.sizes],
    )
    left_out = left_out_scores(text, rates(FITTED))
    shipped, of_unseen, of_images = (
        [score(one, rates()) for one in each] for each in (text, unseen, images)
    )
    return Results(left_out, shipped, of_unseen, of_images)


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--fit", action="store_true", help="constants fitted to all rows")
    parser.add_argument(
        "--write", action="store_true", help="renew RESULTS.md and the errors that plans tell"
    )
    args = parser.parse_args(argv)
    try:
        results = results_of(read_rows())
    except WithdrawnError as exc:
        print(exc, file=sys.stderr)
        return 1
    if args.fit:
        found = fit([one for one in results.setups if one.row.of_lmdeploy], rates(FITTED))
        for name in FITTED:
            print(f"{name}: {getattr(found, name):.4g} (shipped {getattr(rates(), name):.4g})")
        return 0
    text = report(results, datetime.now(timezone.utc).date())
    if args.write:
        (HERE / "RESULTS.md").write_text(text, encoding="utf-8")
        path = preset_path("engines", "surety")
        path.write_text(surety_file(results.kinds), encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
