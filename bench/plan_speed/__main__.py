"""Measures the time of a plan in a new process, as people start it. See README.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.page import ran_on, table

RUNS = 20


def spent(argv: list[str]) -> tuple[float, float, float]:
    """Run a command; returns milliseconds of processor and clock, and peak MiB."""
    began = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 3):  # 3: it does not fit
        raise SystemExit(f"{argv}: exit {child.returncode}")
    return (used.ru_utime + used.ru_stime) * 1000, wall * 1000, used.ru_maxrss / 1024


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.plan_speed", description=__doc__).parse_args()
    from tests.support.checkpoints import write_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "InternVL2-8B"
        write_checkpoint("internvl2-8b", folder)
        plan = [sys.executable, "-m", "turbofit", "plan"]
        jobs = {
            "bare Python": [sys.executable, "-c", "pass"],
            "turbofit plan PRESET": [*plan, "internvl2-8b", "--on", "4xrtx3090"],
            "turbofit plan FOLDER": [*plan, str(folder), "--on", "4xrtx3090"],
            "turbofit plan, which fits nowhere": [*plan, "internvl2-76b", "--on", "1xt4"],
        }
        # In turn; the first round warms the file cache and is not counted.
        rounds = [{name: spent(argv) for name, argv in jobs.items()} for _ in range(RUNS + 1)][1:]
    rows = []
    for name in jobs:
        processor, wall, peak = zip(*(one[name] for one in rounds), strict=True)
        each = (median(processor), median(wall), min(wall), max(wall))
        rows.append((name, *(f"{one:.0f}" for one in each), f"{max(peak):.1f}"))
    print(f"medians of {RUNS} cold runs, {ran_on()}\n")
    print(table("process | CPU ms | wall ms | min | max | peak MiB", rows))


if __name__ == "__main__":
    main()
