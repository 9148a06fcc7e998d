"""``python -m bench.rehearsal.held [--only MODEL] [--write]``: how much of the possible cache?

For each pair: the tokens that a plan holds, those of the same plan rehearsed and calibrated, and
those of the highest ratio with which LMDeploy's real engine survives the plan's worst cases on a
pretend card, found by bisection. All are what the engine cut: a forecast counts a page less, for
the address that a driver may give. The card is charged with contexts and libraries as the plan has
them, so that a calibration learns there one thing: that the driver gave the temporaries of loading
back after the cache was sized (`cache_uncertainty`). ``--write`` renews `HELD.md`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

import turbofit
from turbofit.core.machine import Calibration
from turbofit.core.plan import Plan
from turbofit.core.struct import to_json
from turbofit.core.units import MIB
from turbofit.memory.calibrated import identity
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.turbomind.planned import plan_spec
from turbofit.rehearse.turbomind.probe import rehearse

HERE: Final = Path(__file__).parent
PAIRS: Final = (
    ("internvl2-8b", "1xrtx3090"),
    ("qwen2-vl-7b", "1xrtx3090"),
    ("qwen2.5-7b", "1xrtx3090"),
    ("internvl2-2b", "1xl4"),
    ("qwen2.5-vl-7b", "1xv100-32g"),
    ("internvl3-14b", "1xa100-40g"),
)
_STEPS: Final = 1000


class Held(NamedTuple):
    """Tokens of one pair: planned, rehearsed, calibrated, and of the highest surviving ratio."""

    pair: str
    planned: int
    margin: int
    rehearsed: int
    less: int
    calibrated: int
    least: int
    outcome: str
    highest: int
    ratio: float


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 where a rehearsed plan did not serve."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal.held", description=__doc__)
    parser.add_argument("--only", default="", help="pairs whose model's name has this in it")
    parser.add_argument("--write", action="store_true", help="renew HELD.md")
    args = parser.parse_args(argv)
    began, rows = time.monotonic(), []
    for model, on in PAIRS:
        if args.only in model:
            rows.append(held(model, on))
            print(rows[-1], flush=True)
    page = report(rows, time.monotonic() - began)
    print(page)
    if args.write:
        (HERE / "HELD.md").write_text(page + "\n")
    return any(row.outcome != "served" for row in rows)


def held(model: str, on: str) -> Held:
    """One pair."""
    options = {"on": on, "tp": 1, "replicas": 1, "engine": "turbomind"}
    planned = turbofit.plan(model, **options)
    seen = turbofit.plan(model, rehearse=True, **options)
    assert seen.rehearsal is not None
    learned = calibrated(seen, model, options)
    least = _outcome(learned, learned.settings.cache_max_entry_count)
    served = seen.rehearsal.outcome == "served" and least is not None
    ratio, tokens = highest(seen)
    return Held(
        f"{model} {on}",
        _outcome(planned, planned.settings.cache_max_entry_count) or 0,
        planned.gpus[0].margin,
        seen.rehearsal.cache.tokens or 0,
        seen.gpus[0].margin,
        least or 0,
        learned.gpus[0].margin,
        "served" if served else "died",
        tokens,
        ratio,
    )


def calibrated(plan: Plan, model: str, options: dict[str, Any]) -> Plan:
    """The plan that follows once ``turbofit calibrate`` has measured this one on such a card."""
    (ledger,) = plan.gpus
    doubt = sum(term.bytes for term in ledger.ledger if term.term == "cache_uncertainty")
    made = Calibration(
        model=identity(plan.model),
        engine=plan.engine.name,
        engine_version=plan.engine.version,
        lmdeploy="0.18.0",
        gpus=(ledger.name,),
        driver=str(plan.machine.driver),
        communicator=plan.settings.communicator,
        when=datetime.now(timezone.utc).isoformat(),
        context=0,
        buffers=-(doubt // MIB * MIB),
    )
    with tempfile.TemporaryDirectory(prefix="turbofit-held-") as folder:
        snapshot = Path(folder) / "machine.json"
        snapshot.write_text(to_json(replace(plan.machine, calibrations=(made,))))
        found = turbofit.plan(model, **{**options, "on": str(snapshot)})
    assert found.machine.calibrations
    return found


def highest(plan: Plan) -> tuple[float, int]:
    """The highest ratio with which the engine survives the plan's worst cases, and its tokens."""
    assert plan.rehearsal is not None
    tokens = plan.rehearsal.cache.tokens or 0
    low = round(plan.settings.cache_max_entry_count * _STEPS)
    high = min(_STEPS, low + 200)  # the engine dies there, or there is no such ratio
    while high - low > 1:
        middle = (low + high) // 2
        held = _outcome(plan, middle / _STEPS)
        if held is None:
            high = middle
        else:
            low, tokens = middle, held
    return low / _STEPS, tokens


def _outcome(plan: Plan, ratio: float) -> int | None:
    """Tokens of the cache where the engine serves all worst cases; None where it does not."""
    changed = replace(plan, settings=replace(plan.settings, cache_max_entry_count=ratio))
    with tempfile.TemporaryDirectory(prefix="turbofit-held-") as folder:
        checkpoint = checkpoint_for(plan.model, Path(folder) / plan.model.name)
        seen = rehearse(plan_spec(changed, checkpoint))
    return int(seen["cache"]["tokens"]) if seen["outcome"] == "served" else None


def report(rows: list[Held], seconds: float) -> str:
    """The page."""
    today = datetime.now(timezone.utc).date()
    lines = [
        f"| {row.pair} | {row.planned:,} | {row.margin // MIB} |"
        f" {row.planned / row.highest:.1%} | {row.rehearsed:,} | {row.less // MIB} |"
        f" {row.rehearsed / row.highest:.1%} | {row.calibrated:,} | {row.least // MIB} |"
        f" {row.calibrated / row.highest:.1%} | {row.outcome} | {row.highest:,} ({row.ratio:.3f}) |"
        for row in rows
    ]
    return "\n".join(
        (
            "# How much of the cache that would survive does a plan hold?",
            "",
            f"`python -m bench.rehearsal.held --write`, {today}, {seconds / 60:.0f} minutes on 2"
            " cores with other work; pretend cards, LMDeploy's real engine.",
            "",
            "*highest*: tokens of the highest ratio (in steps of 0.001) with which the engine"
            " survives the plan's own worst cases; contexts and libraries are charged to the"
            " pretend card as the plan has them. All tokens are those of the engine's cache."
            " Bars: 97 % of the highest rehearsed, 99 % calibrated.",
            "*calibrated*: with what `turbofit calibrate` learns on such a card, whose contexts and"
            " libraries are as estimated: that its driver gives loading's temporaries back late.",
            "*they*: those two plans under the worst cases.",
            "",
            "| pair | planned | margin, MiB | of the highest | rehearsed | margin, MiB | of the"
            " highest | calibrated | margin, MiB | of the highest | they | highest |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|",
            *lines,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
