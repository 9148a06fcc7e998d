"""``python -m bench.advice [--write]``: the advice of our users' cases, computed.

Prints the page; ``--write`` renews `RESULTS.md` and the figures in `docs/cases.md`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.advice.cases_page import renewed
from bench.advice.compute import computed
from bench.advice.report import report

HERE = Path(__file__).parent
CASES_PAGE = HERE.parents[1] / "docs" / "cases.md"


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.advice", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="renew RESULTS.md and the figures of docs/cases.md"
    )
    args = parser.parse_args(argv)
    cases = list(computed())
    page = report(cases)
    if args.write:
        (HERE / "RESULTS.md").write_text(page)
        CASES_PAGE.write_text(renewed(CASES_PAGE.read_text(), cases))
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
