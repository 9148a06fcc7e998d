"""What the stages from b on do: trials, each beside its forecast and its rehearsal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu.load import Load
from turbofit.core.errors import TurbofitError
from turbofit.core.plan import Plan
from turbofit.core.struct import to_builtins

__all__ = ["beside", "bisect", "free_seen", "rehearsed", "trial"]

_GRACE = 20.0


def trial(
    plan: Plan, name: str, scratch: Path, seconds: float, environ: Mapping[str, str],
    load: Load | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Start a plan's settings in a process of its own and drive them; its document.

    ``outcome``: ``survived``, ``died`` (of memory), ``out_of_time``, or how else it ended.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    file, out = scratch / f"{name}.plan.json", scratch / f"{name}.out.json"
    file.write_text(plan.to_json())
    out.unlink(missing_ok=True)
    words = [sys.executable, "-m", "bench.gpu.trial", str(file), str(out)]
    words += ["--load", json.dumps(asdict(load))] if load is not None else []
    log = scratch / f"{name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            words, env=dict(environ), stdout=said, stderr=said, cwd=Path.cwd()
        )
        try:
            process.wait(seconds)
            late = False
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGTERM)
        finally:
            _ended(process)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if late and found.get("outcome") in (None, "running"):
        found["outcome"] = "out_of_time"
    if found.get("outcome") not in ("survived", "died"):
        found["said"] = log.read_text(errors="replace").splitlines()[-15:]
    found["code"] = 0 if found.get("outcome") in ("survived", "died") else process.returncode or 1
    return found


def _ended(process: subprocess.Popen[bytes]) -> None:
    """It ends in order, or at once: its engines end with it."""
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def rehearsed(plan: Plan) -> dict[str, Any]:
    """What the engine did with the plan on pretend GPUs, or why that could not be seen."""
    from turbofit.rehearse.confirm import rehearse_plan

    try:
        seen = rehearse_plan(plan).rehearsal
    except (TurbofitError, OSError) as exc:
        return {"not_rehearsed": str(exc)}
    assert seen is not None
    return {
        "outcome": seen.outcome, "free": seen.cache.free[0], "region": seen.cache.region[0],
        "cases": {case.name: case.peak[0] for case in seen.cases},
        "death": to_builtins(seen.death),
    }  # fmt: skip


def beside(plan: Plan, found: dict[str, Any], seen: Mapping[str, Any] | None) -> dict[str, Any]:
    """A trial's document with the forecast, and the rehearsal where there is one.

    ``over`` of the whole is forecast peak minus measured peak: a minus is memory that the plan did
    not see. ``as_forecast``: it lived or died as was said; where it lived against the forecast,
    ``forecast_headroom`` tells by how little it was to die.
    """
    ledger = plan.gpus[0]
    rows = [dict(row) for row in found.get("phases", [])]
    for row in rows:
        row["rehearsed"] = None if seen is None else _of_rehearsal(ledger, row["phase"], seen)
    peaks = [
        row["measured"] for row in rows if row["phase"] not in ("context and weights", "cache")
    ]
    measured = max(peaks, default=None)
    lives = plan.fits or f"{plan.model.name}: serves" in plan.verdict
    # Of one that died before its worst request nothing is left to compare.
    lived = found.get("outcome") == "survived"
    over = ledger.peak - measured if lived and measured is not None else None
    return {
        **found,
        "phases": rows,
        "rehearsal": None if seen is None else dict(seen),
        "tokens": plan.kv.tokens,
        "verdict": plan.verdict,
        "total": ledger.total,
        "margin": ledger.margin,
        "forecast_peak": ledger.peak,
        "measured_peak": measured,
        "over": over,
        "over_share_of_card": None if over is None else over / ledger.total,
        "forecast_lives": lives,
        "forecast_headroom": ledger.headroom,
        "as_forecast": lives == lived,
    }


def _of_rehearsal(ledger: Any, phase: str, seen: Mapping[str, Any]) -> int | None:
    if phase == "context and weights":
        free = seen.get("free")
        return None if free is None else ledger.total - ledger.reserved - int(free)
    if phase == "cache":
        region = seen.get("region")
        return None if region is None else int(region)
    peak = seen.get("cases", {}).get(phase)
    return None if peak is None else int(peak)


def free_seen(plan: Plan, found: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """free(rehearsed) - free(real): what a real card took before the cache that no rehearsal sees.

    The rehearsal was charged with the plan's estimates of it, which are given back here.
    """
    hidden = [
        term for term in plan.gpus[0].ledger
        if term.phase == "context" and term.basis == "estimate"
    ]  # fmt: skip
    charged = sum(term.bytes for term in hidden)
    real = next((one["free"] for one in found.get("seen", [])), None)
    free = seen.get("free")
    if real is None or free is None:
        return {"unseen": None}
    return {
        "free_real": real,
        "free_rehearsed": free + charged,
        "unseen": free + charged - real,
        "estimated": {term.term: term.bytes for term in hidden},
        "over": charged - (free + charged - real),
    }


def bisect(
    low: int, high: int, try_at: Callable[[int], str], steps: dict[str, str], step: int
) -> int:
    """The largest ratio that survives, in thousandths, to within ``step``; ``low`` is known to.

    Args:
        low: a ratio that survives.
        high: one that need not be tried: above all.
        try_at: takes thousandths, gives ``survived`` or ``died``; raises what ends the search.
        steps: what is known already, by thousandths; it is added to.
        step: thousandths.
    """
    for at, outcome in steps.items():
        low = max(low, int(at)) if outcome == "survived" else low
        high = min(high, int(at)) if outcome == "died" else high
    while high - low > step:
        middle = (low + high) // 2
        outcome = try_at(middle)
        steps[str(middle)] = outcome
        if outcome == "survived":
            low = middle
        else:
            high = middle
    return low
