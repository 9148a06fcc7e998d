"""One plan's rehearsal in a process of its own, so that it can be bounded: ``PLAN OUT``."""

from __future__ import annotations

import json
import signal
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.struct import to_builtins
from turbofit.rehearse.confirm import rehearse_plan

__all__ = ["rehearsal"]

#: How a rehearsal's timeline names a worst case.
_CASE = "case "


def rehearsal(plan: Plan) -> dict[str, Any]:
    """What the engine did with the plan on pretend GPUs, or why that could not be seen."""
    try:
        whole = rehearse_plan(plan)
    except (TurbofitError, OSError) as exc:
        return {"not_rehearsed": str(exc)}
    seen = whole.rehearsal
    assert seen is not None
    ledger = whole.gpus[0].ledger
    # Of the whole card, as NVML has it: with others, and with what the plan charges unseen.
    peaks = {one.phase: one.peak[0] for one in seen.timeline}
    steady = [
        one.end[0] for one in takewhile(lambda m: not m.phase.startswith(_CASE), seen.timeline)
    ]
    return {
        "outcome": seen.outcome, "free": seen.cache.free[0], "region": seen.cache.region[0],
        "steady": steady[-1] if steady else None,
        "cases": {k.removeprefix(_CASE): v for k, v in peaks.items() if k.startswith(_CASE)},
        "terms": {term.term: term.rehearsed for term in ledger if term.rehearsed is not None},
        "death": to_builtins(seen.death),
    }  # fmt: skip


def main(words: list[str]) -> int:
    """See above."""
    # Its engine ends with it: SystemExit passes through what stops children.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = rehearsal(Plan.from_json(Path(words[0]).read_bytes()))
    Path(words[1]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
