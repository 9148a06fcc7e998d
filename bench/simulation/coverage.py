"""``python -m bench.simulation.coverage``: which lines of supervision no simulated day ran.

A line that never ran is a branch that the simulation says nothing about.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from bench.simulation import scheduler
from bench.simulation.scenario import simulate

PACKAGE = Path(__file__).parents[2] / "turbofit"
#: What a day runs: supervisor, ladder, leases, retries, admission, the watch over engines.
FILES = (
    "launch/serve/supervisor.py", "launch/serve/session.py", "launch/serve/ladder.py",
    "launch/serve/attempt.py", "launch/serve/leases.py", "launch/serve/reservations.py",
    "launch/serve/planner.py", "launch/serve/gpu_monitor.py", "launch/serve/retry_memory.py",
    "launch/serve/record.py", "launch/engine/supervised_engine.py", "launch/engine/engine_exit.py",
    "launch/engine/readiness_probe.py", "launch/engine/startup_tracker.py",
    "gateway/routing/admission.py", "gateway/routing/request_forwarder.py",
    "gateway/routing/exchange.py", "gateway/routing/retry.py", "gateway/routing/health.py",
    "gateway/routing/engines.py", "gateway/routing/fleet.py",
)  # fmt: skip


def main() -> int:
    """Run some days slowly, and show the lines that did not run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulation.coverage", description=__doc__
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--days", type=int, default=100, help="how many")
    parser.add_argument("--lines", action="store_true", help="show the lines, not their number")
    given = parser.parse_args()
    ran = _ran(range(given.first, given.first + given.days))
    share = [0, 0]
    for name in FILES:
        wanted = _statements(PACKAGE / name)
        missed = sorted(wanted - ran[str(PACKAGE / name)])
        share[0] += len(wanted) - len(missed)
        share[1] += len(wanted)
        print(f"{name}: {len(wanted) - len(missed)} of {len(wanted)} statements")
        if given.lines and missed:
            print(f"    not: {_ranges(missed)}")
    print(f"{share[0]} of {share[1]} statements ({share[0] / share[1]:.0%}) in {given.days} days")
    return 0


def _ran(seeds: range) -> dict[str, set[int]]:
    """Lines by file that ran in these days."""
    ran: dict[str, set[int]] = defaultdict(set)
    wanted = {str(PACKAGE / name) for name in FILES}
    seen: dict[CodeType, set[int] | None] = {}

    def tracer(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in seen:
            seen[code] = ran[code.co_filename] if code.co_filename in wanted else None
        lines = seen[code]
        if lines is None:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return tracer

    scheduler.TRACERS.append(tracer)
    sys.settrace(tracer)
    try:
        for seed in seeds:
            simulate(seed)
    finally:
        sys.settrace(None)
        scheduler.TRACERS.clear()
    return ran


def _statements(path: Path) -> set[int]:
    """The first lines of all statements inside functions; what runs at import is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[int] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if not isinstance(node, ast.stmt) or node is function:
                continue
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.With):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            found.add(node.lineno)
    return found


def _ranges(lines: list[int]) -> str:
    """``3, 5-7``."""
    parts: list[list[int]] = []
    for line in lines:
        if parts and line == parts[-1][1] + 1:
            parts[-1][1] = line
        else:
            parts.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


if __name__ == "__main__":
    sys.exit(main())
