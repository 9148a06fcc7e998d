"""What does turbofit answer for each architecture that LMDeploy lists?

Needs LMDeploy:

    python -m bench.registry [--write]
"""

from __future__ import annotations

import argparse
import sys

from bench.registry.page import OUT, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.registry", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write RESULTS.md anew")
    options = parser.parse_args()
    if options.write:
        OUT.write_text(table(), encoding="utf-8")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
