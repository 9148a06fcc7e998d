"""``python -m bench.several.starts``: 1,000 starts of engines in turns, asleep and together."""

from __future__ import annotations

import argparse
import sys
import time

from bench.several.history import History, Kind

_THREE = ("internvl2-2b", "qwen2-vl-2b", "internvl2-1b")
KINDS = (
    Kind("in turns", ("internvl2-8b", "qwen2-vl-7b", "internvl2-2b"), "1xrtx3090",
         {"swap": True}, pause=15.0),
    Kind("in turns, two at once", _THREE, "1xrtx3090", {"swap": True},
         {"budget": "11GiB"}, at_once=2, pause=15.0),
    Kind("asleep", ("internvl2-8b",), "1xrtx3090", {"idle": "1m"}, pause=90.0),
    Kind("together, asleep, engines die", _THREE, "1xrtx3090", {"idle": "5m"}, at_once=3,
         pause=120.0, faults=6.0),
    Kind("in turns, engines die", ("internvl2-8b", "qwen2-vl-7b"), "1xrtx3090",
         {"swap": True}, pause=15.0, faults=6.0),
)  # fmt: skip


def main() -> int:
    """Run the histories; 1 where something that must hold did not."""
    parser = argparse.ArgumentParser(prog="python -m bench.several.starts", description=__doc__)
    parser.add_argument("--starts", type=int, default=1000, help="of engines, in each history")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a history, by its name")
    parser.add_argument("--log", action="store_true", help="print the history")
    given = parser.parse_args()
    bad = False
    for kind in KINDS:
        if given.only not in (None, kind.name):
            continue
        began = time.monotonic()
        seen = History(given.seed, kind, given.starts).run()
        if given.log:
            print("\n".join(seen.log))
        print(
            f"{kind.name}: {seen.starts:,} starts, {seen.deaths:,} deaths, requests "
            f"{seen.requests}, the longest answered took {seen.longest:.0f} s, "
            f"{seen.seconds / 3600:.1f} virtual hours in {time.monotonic() - began:.0f} s; "
            f"{len(seen.violations)} violations"
        )
        for one in seen.violations[:5]:
            print(f"  {one}", file=sys.stderr)
        bad = bad or bool(seen.violations)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
