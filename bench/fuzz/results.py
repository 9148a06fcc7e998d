"""What was run: processor time and calls of each target, as tables."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Final

from bench.fuzz import corpus
from bench.fuzz.targets import TARGETS

__all__ = ["write"]

_RESULTS: Final = Path(__file__).with_name("RESULTS.md")


def write(folder: Path) -> None:
    """Write RESULTS.md from the counts in a folder."""
    rows, hours, calls = [], 0.0, 0
    for name in TARGETS:
        tallies = [json.loads(path.read_text()) for path in folder.glob(f"tally/{name}-*.json")]
        seconds = sum(one["seconds"] for one in tallies)
        made = sum(one["calls"] for one in tallies)
        kept = corpus.inputs(name)
        broke = sum(bool(one.note) for one in kept)
        grown = len(list(folder.glob(f"corpus/{name}/*")))
        left = len([one for one in folder.glob(f"found/{name}/*") if one.suffix != ".txt"])
        rows.append(
            f"| {name} | {seconds / 3600:.2f} | {made:,} | {made / max(seconds, 1):,.0f} "
            f"| {grown:,} | {len(kept)} | {broke} | {left} |"
        )
        hours, calls = hours + seconds / 3600, calls + made
    _RESULTS.write_text(
        f"""# What fuzzing found

Written by `python -m bench.fuzz --write` on {time.strftime("%Y-%m-%d")}, Python \
{platform.python_version()}: {hours:.2f} CPU hours and {calls:,} calls in all, instrumented by \
atheris. *Broke* counts the inputs kept here that once ended wrongly, each mended; *left* counts \
findings that are not.

| target | CPU hours | calls | calls a second | corpus | kept here | broke | left |
|---|---|---|---|---|---|---|---|
"""
        + "".join(f"{row}\n" for row in rows),
        encoding="utf-8",
    )
