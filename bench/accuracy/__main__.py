"""``python -m bench.accuracy [--write]``: the rows of `rows.jsonl` beside their forecasts.

Prints the page; ``--write`` renews `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import sys

from bench.accuracy.report import report
from bench.accuracy.rows import HERE, read_rows
from bench.accuracy.score import score


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew RESULTS.md")
    args = parser.parse_args(argv)
    page = report(*score(read_rows()))
    if args.write:
        (HERE / "RESULTS.md").write_text(page)
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
