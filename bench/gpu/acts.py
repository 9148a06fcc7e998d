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

from bench.gpu.kept import keep
from bench.gpu.load import Load
from turbofit.core.plan import GpuLedger, Plan

__all__ = ["RESULTS", "beside", "bisect", "free_seen", "of_rehearsal", "rehearsed", "trial"]

_GRACE = 20.0
#: Outcomes that say something of the settings; any other is no result.
RESULTS = ("survived", "died")


def trial(
    plan: Plan, name: str, scratch: Path, seconds: float, environ: Mapping[str, str],
    load: Load | None = None, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Start a plan's settings in a process of its own and drive them; its document.

    ``outcome``: ``survived``, ``died`` (of memory); anything else is no result, and ``code`` is not
    0: ``out_of_time``, ``failed`` where it wrote nothing, or how it ended. ``out`` is where its
    plan and logs are kept.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    file, wrote = scratch / f"{name}.plan.json", scratch / f"{name}.out.json"
    file.write_text(plan.to_json())
    wrote.unlink(missing_ok=True)
    words = ["bench.gpu.trial", str(file), str(wrote)]
    words += ["--load", json.dumps(asdict(load))] if load is not None else []
    log, folder = scratch / f"{name}.log", scratch / f"{name}.out.run"
    code, late = _run(words, log, seconds, environ)
    if out is not None:
        logs = {"engine-0.log": folder / "engine-0.log", "run.json": folder / "run.json"}
        keep(out, name, file, {**logs, "trial.log": log, "trial.json": wrote}, scratch)
    found: dict[str, Any] = json.loads(wrote.read_text()) if wrote.exists() else {}
    if found.get("outcome") in RESULTS:
        return {**found, "code": 0}
    # What it wrote last is of no weight: it was on its way, or never began.
    told = found.get("outcome")
    outcome = "out_of_time" if late else "failed" if told in (None, "running") else told
    said = log.read_text(errors="replace").splitlines()[-15:]
    return {**found, "outcome": outcome, "said": said, "code": code or 1}


def _run(
    words: list[str], log: Path, seconds: float, environ: Mapping[str, str]
) -> tuple[int, bool]:
    """A module's program: its code, and whether its time was over. It ends in order, or at once."""
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], env=dict(environ), stdout=said, stderr=said,
            cwd=Path.cwd(),
        )  # fmt: skip
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGTERM)
        finally:
            _ended(process)
    return process.returncode, late


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Its engines end with it."""
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def rehearsed(
    plan: Plan, name: str, scratch: Path, seconds: float, environ: Mapping[str, str]
) -> dict[str, Any]:
    """What the engine did with the plan on pretend GPUs within so many seconds, or why not."""
    scratch.mkdir(parents=True, exist_ok=True)
    file, out = scratch / f"{name}.rehearse.json", scratch / f"{name}.rehearsed.json"
    log = scratch / f"{name}.rehearsal.log"
    file.write_text(plan.to_json())
    out.unlink(missing_ok=True)
    _, late = _run(["bench.gpu.rehearsal", str(file), str(out)], log, seconds, environ)
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text())
        return found
    last = log.read_text(errors="replace").splitlines()[-1:]
    return {"not_rehearsed": "its time was over" if late else " ".join(last) or "it ended"}


def beside(plan: Plan, found: dict[str, Any], seen: Mapping[str, Any] | None) -> dict[str, Any]:
    """A trial's document with the forecast, and the rehearsal where there is one.

    ``over`` of the whole is forecast peak minus measured peak: a minus is memory that the plan did
    not see. ``as_forecast``: it lived or died as was said, None where it did neither; where it
    lived against the forecast, ``forecast_headroom`` tells by how little it was to die.
    """
    ledger = plan.gpus[0]
    rows = [dict(row) for row in found.get("phases", [])]
    for row in rows:
        row["rehearsed"] = None if seen is None else of_rehearsal(ledger, row["phase"], seen)
    peaks = [
        row["measured"] for row in rows if row["phase"] not in ("context and weights", "cache")
    ]
    measured = max(peaks, default=None)
    lives = plan.fits or f"{plan.model.name}: serves" in plan.verdict
    # Of one that died before its worst request nothing is left to compare.
    ended, lived = found.get("outcome") in RESULTS, found.get("outcome") == "survived"
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
        "as_forecast": lives == lived if ended else None,
    }


def of_rehearsal(ledger: GpuLedger, phase: str, seen: Mapping[str, Any]) -> int | None:
    """What a rehearsal says of one phase of `beside`, where it says anything."""
    if phase == "context and weights":
        free = seen.get("free")
        return None if free is None else ledger.total - ledger.reserved - int(free)
    if phase == "cache":
        region = seen.get("region")
        return None if region is None else int(region)
    peak = seen.get("steady") if phase == "steady" else seen.get("cases", {}).get(phase)
    return None if peak is None else int(peak)


def free_seen(plan: Plan, found: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """Free memory right before the cache: the engine's own figure beside forecast and rehearsal.

    ``estimated`` are the plan's terms up to then that no rehearsal sees, ``unseen`` what they took
    on the card: what the rehearsal (where there is none: the plan's other terms) left free, less
    the engine's figure. ``over`` is what was charged beyond it; a minus was not seen.
    """
    ledger = plan.gpus[0]
    early = [t for t in ledger.ledger if t.phase in ("before", "context", "weights")]
    hidden = {t.term: t.bytes for t in early if t.phase == "context" and t.basis == "estimate"}
    charged = sum(hidden.values())
    forecast = ledger.total - ledger.reserved - sum(t.bytes for t in early)
    real = next((one["free"] for one in found.get("seen", [])), None)
    free = seen.get("free")
    if real is None:
        return {"unseen": None, "free_forecast": forecast, "estimated": hidden}
    base = forecast if free is None else int(free)
    return {
        "free_real": real, "free_forecast": forecast,
        "free_rehearsed": None if free is None else base + charged,
        "unseen": base + charged - real, "estimated": hidden, "over": real - base,
        "terms": {t.term: t.bytes for t in early},
    }  # fmt: skip


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
