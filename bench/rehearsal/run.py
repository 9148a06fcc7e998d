"""Compares TurboMind's forecasts with rehearsals on pretend GPUs. See README.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import structs

import turbofit
from bench.page import table
from bench.rehearsal.grid import ROWS, Row
from turbofit.core.model import Quantization
from turbofit.core.plan import Plan
from turbofit.core.units import MIB
from turbofit.memory.account import PAGE, POOL_WARMUP, TEMPORARIES, Forward, capability_of
from turbofit.memory.turbomind.account import FUSES_NOTHING, TurbomindAccount, warmup_tokens
from turbofit.memory.turbomind.pool import PoolModel
from turbofit.memory.turbomind.weights import load_constants
from turbofit.model.presets import find_preset, preset_model
from turbofit.rehearsal.checkpoint.twin import checkpoint_for, twin_of, write_model
from turbofit.rehearsal.planned import plan_spec, rehearse
from turbofit.rehearsal.spec import RehearsalCase, RehearsalRequest

TEXT = 32
EXACT = 0.0005
OVER = 0.03
OVER_BYTES = 16 * MIB


#: What precedes the figures in a results file.
HEAD = """# The account against the real engine

`python -m bench.rehearsal.run`: LMDeploy 0.18.0's TurboMind on pretend GPUs (simulated cards, the
real engine library), {date}, CPU torch, 2 shared cores. `forecast` is what turbofit said before the
start, `engine` what the engine then allocated; estimates that no rehearsal can see (CUDA context,
NCCL, kernel images, real cuBLAS workspaces) are left out on both sides. A cache forecast under the
engine's is on the safe side.

{told}

The 40 largest differences:

{table}

## Rows

{rows}
"""


class Check(NamedTuple):
    """One comparison, in bytes (``tokens`` in tokens); ``bad`` if the difference is too large."""

    row: str
    what: str
    forecast: int
    seen: int
    bad: bool
    bound: bool = False


class Ran(NamedTuple):
    """The result of a row, and the day when it ran."""

    row: str
    outcome: str
    seconds: float
    day: str
    checks: list[Check]


def model_of(row: Row, folder: Path) -> str:
    """Return the row's preset, or a new folder of its model in another quantisation."""
    if not row.packing:
        return row.model
    preset = find_preset(row.model)
    assert preset is not None, row.model
    bits: Any = 8 if row.packing == "fp8" else 4
    packing = Quantization(method=row.packing, bits=bits, group_size=128)
    name = f"{row.model}-{row.packing}"
    model = structs.replace(preset_model(preset), name=name, quantization=packing)
    return str(write_model(twin_of(model), folder / name))


def forecast_of(row: Row, model: str) -> Plan:
    """Return turbofit's prediction of a row."""
    return turbofit.predict(model, on=row.on, tp=row.tp, **row.settings)


class Driven(NamedTuple):
    """A case of the rehearsal; ``forward`` is None if several requests may share forwards."""

    name: str
    requests: list[RehearsalRequest]
    forward: Forward | None
    units: int = 0


def cases_of(row: Row, plan: Plan) -> Iterator[Driven]:
    """Yield the cases of a row."""
    tokens = (
        plan.engines[0].settings.max_prefill_token_num + plan.engines[0].settings.max_batch_size
    )
    tokens = -(-tokens // plan.engines[0].settings.tp) * plan.engines[0].settings.tp
    for unit in row.units:
        size = _units(unit)
        image = unit if isinstance(unit, int) else (1, *unit)
        prompt = TEXT + (size * 256 if isinstance(unit, int) else size // 4)
        if prompt >= min(plan.engines[0].settings.session_len, plan.engines[0].kv.tokens):
            continue
        request = RehearsalRequest(TEXT, (image,), max_new_tokens=2)
        forward = Forward(tokens=min(tokens, prompt), context=prompt, units=size)
        yield Driven(f"one of {unit}", [request], forward, size)
    for count in row.queued:
        unit = row.units[min(1, len(row.units) - 1)]
        image = unit if isinstance(unit, int) else (1, *unit)
        many = [
            RehearsalRequest(8 + 61 * i % 257, (image,), max_new_tokens=2) for i in range(count)
        ]
        yield Driven(f"{count} of {unit} queued", many, None, _units(unit))
    longest = min(plan.engines[0].settings.session_len, plan.engines[0].kv.tokens) - 64
    if row.long:
        request = RehearsalRequest(longest, max_new_tokens=2)
        forward = Forward(tokens=min(tokens, longest), context=longest)
        yield Driven(f"prompt of {longest}", [request], forward)
    if row.sampling:
        rows = min(plan.engines[0].settings.max_batch_size, plan.engines[0].kv.tokens // 64)
        request = RehearsalRequest(2, max_new_tokens=2, top_k=0)
        forward = Forward(tokens=min(tokens, rows * 2), context=rows * 2, rows=rows, top_k_0=True)
        yield Driven(f"{rows} with top_k=0", [request] * rows, forward)


def _units(unit: Any) -> int:
    return unit if isinstance(unit, int) else unit[0] * unit[1]


def check_row(row: Row, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """Rehearse a row; returns its comparisons and the rehearsal's document."""
    plan = forecast_of(row, model_of(row, folder))
    checkpoint = folder / plan.model.name
    if not checkpoint.exists():
        checkpoint_for(plan.model, checkpoint)
    driven = list(cases_of(row, plan))
    cases = tuple(RehearsalCase(case.name, tuple(case.requests)) for case in driven)
    seen = rehearse(replace(plan_spec(plan, checkpoint), cases=cases))
    checks = list(fate_checks(row, plan, seen))
    if seen["cache"].get("region") and seen["cache"]["region"][0]:
        checks += size_checks(row, plan, seen)
    if seen["outcome"] == "served":
        checks += pool_checks(row, plan, seen, driven)
    return checks, seen


def fate_checks(row: Row, plan: Plan, seen: dict[str, Any]) -> Iterator[Check]:
    """Compare whether the engine starts, hangs or dies, and in which phase."""
    verdict = plan.verdict
    told = (
        "load" if "while loading" in verdict
        else "hang" if "never starts" in verdict
        else "start" if "while starting" in verdict or "warm-up" in verdict
        else "serves"
    )  # fmt: skip
    outcome, death = seen["outcome"], seen["death"]
    phase = (death or {}).get("phase", "")
    was = "serves" if outcome == "served" or phase.startswith("case") else (
        "hang" if outcome == "hang"
        else "load" if phase in ("import", "context", "weights", "prepare", "engine")
        else "start"
    )  # fmt: skip
    yield Check(row.name, f"fate: told {told}, was {was}", 0, 0, told != was)
    if phase.startswith("case"):
        deadly = "aborts" in verdict
        yield Check(row.name, f"dies of {phase}: told", 0, 0, not deadly)


def size_checks(row: Row, plan: Plan, seen: dict[str, Any]) -> list[Check]:
    """Compare weights, cache, tokens and persistent buffers of every rank."""
    checks, step = [], load_constants(plan.backend.version).pool_granularity
    for rank, index in enumerate(plan.groups[0]):
        ledger = next(g for g in plan.ledgers if g.index == index).terms
        exact = [t for t in ledger if t.basis != "estimate"]
        terms = seen["terms"][rank]
        weights = sum(t.bytes for t in exact if t.term.startswith("weights."))
        region = seen["cache"]["region"][rank]
        late = (POOL_WARMUP, *TurbomindAccount.grown)  # not there before the first image
        buffers = sum(t.bytes for t in exact if t.phase == "buffers" and t.term not in late)
        held = sum(t.bytes for t in exact if t.term == "kv_cache") + buffers
        # Rounded up by themselves in the forecast; the engine's share the last step of a pool.
        under = -step if any(t.term == TEMPORARIES for t in ledger) else 0
        allowed = {
            "weights": (0, 0), "cache": (under, 0), "cache and buffers": (under, step + PAGE)
        }  # fmt: skip
        pairs = [
            ("weights", weights, terms["weights"]),
            ("cache", plan.engines[0].kv.region_bytes, region),
        ]
        if "buffers" in terms:  # they share a pool with the cache, so its last page
            pairs.append(("cache and buffers", held, terms["kv_cache"] + terms["buffers"]))
        for what, forecast, was in pairs:
            over, near = forecast - was, max(MIB, EXACT * was)
            least, most = allowed[what]
            bad = not least - near <= over <= most + near
            checks.append(Check(row.name, f"{what} rank {rank}", forecast, was, bad))
        # Estimates that a rehearsal cannot see.
        hidden = sum(t.bytes for t in ledger if t.phase == "context" and t.basis == "estimate")
        others = sum(t.bytes for t in ledger if t.phase == "before")
        gpu = next(g for g in plan.ledgers if g.index == index)
        told, was = gpu.load_peak - hidden - others, seen["gpus"][rank]["load_peak"]
        bad = told < was or told - was > max(OVER * was, step)
        checks.append(Check(row.name, f"load peak rank {rank}", told, was, bad))
    tokens = seen["cache"]["tokens"]
    if tokens is not None:
        slab = seen["cache"]["slab_size"] // seen["cache"]["object_size"] * 64
        bad = not tokens - 2 * slab <= plan.engines[0].kv.tokens <= tokens
        checks.append(Check(row.name, "tokens", plan.engines[0].kv.tokens, tokens, bad))
    return checks


def pool_checks(row: Row, plan: Plan, seen: dict[str, Any], driven: list[Driven]) -> list[Check]:
    """Compare the executor's pool: in the warm-up, in each case, and with the plan's bound."""
    constants = load_constants(plan.backend.version)
    fuses = capability_of(plan.machine.gpus[plan.groups[0][0]], unknown=FUSES_NOTHING)
    pool = PoolModel(plan.model, plan.engines[0].settings, constants, fuses)
    tokens = warmup_tokens(plan.engines[0].settings, constants)
    first = seen["gpus"][0]["pools"]["executor"]["live_peak"]
    warm_up = Forward(tokens=tokens, context=tokens, first_layer=True)
    checks = [_never_under(row, "warm-up", pool.peak(warm_up), first["warm-up"])]
    bound = max(t.bytes for t in plan.ledgers[0].terms if t.phase == "transient")
    for case, given in zip(seen["cases"], driven, strict=True):
        peak = max(case["transient"])
        if given.forward is not None:
            checks.append(_never_under(row, given.name, pool.peak(given.forward), peak))
        if (
            given.units <= plan.promise.limits.units_per_image
        ):  # what no gateway admits is not promised
            name = f"bound over {given.name}"
            checks.append(Check(row.name, name, bound, peak, peak > bound, bound=True))
    return checks


def _never_under(row: Row, what: str, forecast: int, seen: int) -> Check:
    over = forecast - seen
    return Check(row.name, what, forecast, seen, over < 0 or over > max(OVER * seen, OVER_BYTES))


def largest(checks: list[Check]) -> str:
    """Return the largest differences as Markdown, the worst first."""
    sized = [c for c in checks if c.seen and c.what != "tokens" and not c.bound]
    rows = [
        (c.row, c.what, f"{c.forecast / MIB:.2f}", f"{c.seen / MIB:.2f}",
         f"{(c.forecast - c.seen) / MIB:+.2f}")
        for c in sorted(sized, key=lambda c: -abs(c.forecast - c.seen))[:40]
    ]  # fmt: skip
    return table("row | what | forecast MiB | engine MiB | difference", rows)


def summary(checks: list[Check], seconds: float, rows: int) -> str:
    """Return the counts, the extremes and the failed comparisons."""
    exact = [c for c in checks if c.seen and not c.bound and c.what != "tokens"]
    bounds = [c for c in checks if c.bound]
    bad = [c for c in checks if c.bad]
    cache = [c for c in exact if c.what.startswith("cache")]
    taken = [c for c in exact if c not in cache]
    fates = [c for c in checks if c.what.startswith(("fate", "dies"))]
    excess = [c.forecast / c.seen - 1 for c in bounds] or [0.0]
    lines = [
        f"{rows} starts of the engine, {len(checks)} comparisons, {seconds:.0f} s.",
        "",
        f"- what the engine took: forecast from {_most(taken, -1):.2f} MiB under"
        f" to {_most(taken, 1):.2f} MiB over",
        f"- the cache, with the buffers beside it: from {_most(cache, -1):.2f} MiB under"
        f" to {_most(cache, 1):.2f} MiB over",
        f"- the bound over every case: held in {sum(not c.bad for c in bounds)} of {len(bounds)};"
        f" excess {min(excess):.0%} to {max(excess):.0%} of the case",
        f"- deaths, hangs and survivals told: {sum(not c.bad for c in fates)} of {len(fates)}",
        f"- bars missed: {len(bad)}",
    ]
    lines += [f"  - {c.row}: {c.what}: {c.forecast} against {c.seen}" for c in bad]
    return "\n".join(lines)


def _most(checks: list[Check], sign: int) -> float:
    return max([0.0, *(sign * (c.forecast - c.seen) / MIB for c in checks)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal.run", description=__doc__)
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument(
        "--record", type=Path, help="keep what rows gave in this file; rows in it do not run again"
    )
    args = parser.parse_args()
    stored = args.record.read_bytes() if args.record and args.record.exists() else b""
    ran = [msgspec.json.decode(line, type=Ran) for line in stored.splitlines()]
    known = {one.row for one in ran}
    rows = [row for row in ROWS if (args.only or "") in row.name]
    with tempfile.TemporaryDirectory() as scratch:
        for number, row in enumerate(rows, 1):
            if row.name in known:
                continue
            checks, seen = check_row(row, Path(scratch))
            day = time.strftime("%Y-%m-%d")
            ran.append(Ran(row.name, seen["outcome"], seen["seconds"], day, checks))
            if args.record:
                with args.record.open("ab") as file:
                    file.write(msgspec.json.encode(ran[-1]) + b"\n")
            said = f"{seen['outcome']} in {seen['seconds']} s, {len(checks)} comparisons"
            bad = sum(c.bad for c in checks)
            print(f"[{number}/{len(rows)}] {row.name}: {said}, {bad} missed", file=sys.stderr)
    every = [check for one in ran for check in one.checks]
    cells = [
        (one.row, one.outcome, len(one.checks), sum(c.bad for c in one.checks), one.day)
        for one in ran
    ]
    told = summary(every, sum(one.seconds for one in ran), len(ran))
    shown = table("row | outcome | comparisons | missed | run", cells)
    date = time.strftime("%Y-%m-%d")
    print(HEAD.format(date=date, told=told, table=largest(every), rows=shown), end="")
    return 1 if any(c.bad for c in every) else 0


if __name__ == "__main__":
    raise SystemExit(main())
