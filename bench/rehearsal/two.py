"""Two plans of LMDeploy's PyTorch engine on one pretend card, one beside the other.

Needs a Python with a CUDA build of torch (no GPU) and LMDeploy 0.18:

    python -m bench.rehearsal.two [--model qwen2-vl-2b] [--on 1xrtx3090] [--out FILE]

The first plan may take half of the card (``budget``). Its engine is driven through its worst cases,
of which torch keeps what they took. The second is planned with that as the memory of others and
starts; then both run their worst cases at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.rehearsal.pytorch import mib, table
from turbofit import api
from turbofit.core.plan import Plan
from turbofit.pretend.documents import dumped
from turbofit.pretend.run import FinishedRun, run_pretend
from turbofit.pretend.scenario import Scenario
from turbofit.rehearse.torch.torch_planned import planned_scenario, planned_spec
from turbofit.rehearse.torch.torch_run import need_packages, torch_environment
from turbofit.rehearse.turbomind.notes import read_notes

#: How often each engine repeats its cases: the first outlives the second.
ROUNDS = {"first": 12, "second": 2}

TEXT = """# Two engines on one card

`{command}`, {date}: {versions}.
{model} on a pretend {card}, {usable} MiB usable. Sizes
are in MiB. The first plan has a budget of half of the card; the second was made with the first's
peak as the memory of others, and started when the first had served its worst cases. Kernel modules
and the HTTP servers' contexts are charged for both; the second's is there when the first looks,
which makes its cache smaller than was promised.

{rows}

At the fullest moment the card held **{peak}** MiB of {usable} (forecast for both: {forecast});
refused allocations: {refused}. The first still served when the second had ended: {overlap}.
"""


def plans(model: str, on: str) -> tuple[Plan, Plan]:
    """One with half of the card, and one with what that leaves."""
    usable = usable_of(api.plan(model, on=on, engine="pytorch"))
    first = api.plan(model, on=on, engine="pytorch", budget=usable // 2)
    left = (usable - first.gpus[0].peak) >> 20
    return first, api.plan(model, on=f"{on}:free={left}MiB", engine="pytorch")


def usable_of(plan: Plan) -> int:
    return plan.gpus[0].total - plan.gpus[0].reserved


def drive(folder: Path) -> int:
    """On the pretend machine: the second starts once the first has served each of its cases."""
    children = []
    for name, rounds in ROUNDS.items():
        child_folder = folder / name
        env = {**os.environ, "TURBOFIT_REHEARSAL": str(child_folder)}
        command = [sys.executable, "-m", "turbofit.rehearse.torch.torch_child", str(child_folder)]
        children.append(subprocess.Popen(command, env=env))
        each = len(json.loads((child_folder / "spec.json").read_text())["cases"]) // rounds
        while len(read_notes(child_folder).get("cases", [])) < each and children[-1].poll() is None:
            time.sleep(0.1)
    children[1].wait()
    (folder / "overlap").write_text(json.dumps(children[0].poll() is None))
    children[0].wait()
    return 0


def charged(first: Plan, second: Plan) -> Scenario:
    """The first's card, on which the second's HTTP server has its context from the beginning.

    So the first's cache is a little smaller than it was promised. Each process pays by itself for
    its own context and for what is loaded late.
    """
    scenario, other = planned_scenario(first), planned_scenario(second).gpus[0]
    mine = scenario.gpus[0]
    gpu = dataclasses.replace(mine, used=mine.used + other.used - second.gpus[0].used)
    return dataclasses.replace(scenario, gpus=(gpu,))


def rehearse(first: Plan, second: Plan, folder: Path) -> FinishedRun:
    """Both on one pretend card."""
    environ: dict[str, str] = {}
    for (name, rounds), plan in zip(ROUNDS.items(), (first, second), strict=True):
        child_folder = folder / name
        child_folder.mkdir()
        spec = planned_spec(plan, child_folder)
        spec = dataclasses.replace(spec, cases=spec.cases * rounds)
        (child_folder / "spec.json").write_text(dumped(spec))
        environ |= spec.environ
    return run_pretend(
        [sys.executable, "-m", "bench.rehearsal.two", "--drive", str(folder)],
        charged(first, second),
        keep=folder / "pretend",
        stdout=2,
        base=torch_environment(folder, environ),
    )


def row_of(name: str, plan: Plan, folder: Path) -> tuple[str, ...]:
    """One engine: what it was promised, and what its own notes say."""
    notes: dict[str, Any] = read_notes(folder / name)
    cache, words = notes.get("cache") or {}, {}
    for case in notes.get("cases", []):
        for status, count in case["statuses"].items():
            words[status] = words.get(status, 0) + count
    tokens = ((cache.get("num_gpu_blocks") or 2) - 2) * plan.settings.cache_block_seq_len
    told = " ".join(f"{count} {status}" for status, count in words.items())
    error = (notes.get("error") or {}).get("message", "")[:80]
    return (
        name,
        str(plan.settings.cache_max_entry_count),
        mib(plan.gpus[0].used),
        mib(plan.gpus[0].peak - plan.gpus[0].used),
        f"{plan.kv.tokens:,} / {tokens:,}",
        told or "none",
        error or "lived",
    )


def report(first: Plan, second: Plan, folder: Path, ran: FinishedRun) -> tuple[str, bool]:
    """The document, and whether both lived within the card and within their forecasts."""
    both = zip(ROUNDS, (first, second), strict=True)
    rows = [row_of(name, plan, folder) for name, plan in both]
    gpu = ran.scenario.gpus[0]
    peak = gpu.used + ran.shared.peak[0]
    forecast = first.gpus[0].peak + second.gpus[0].peak - second.gpus[0].used
    refused = sum(len(usage.refused) for usage in ran.usages)
    overlap = json.loads((folder / "overlap").read_text())
    text = TEXT.format(
        command="python -m bench.rehearsal.two",
        date=dt.date.today().isoformat(),
        versions=", ".join(f"{k} {v}" for k, v in sorted(need_packages("pytorch").items())),
        model=first.model.name,
        card=first.gpus[0].name,
        usable=mib(gpu.total),
        rows=table(
            ("engine", "ratio", "held by others", "own peak, forecast",
             "tokens promised / held", "requests", "end"),
            rows,
        ),
        peak=mib(peak),
        forecast=mib(forecast),
        refused=refused,
        overlap="yes" if overlap else "no",
    )  # fmt: skip
    lived = all(row[-1] == "lived" and row[-2].endswith("finished") for row in rows)
    return text, lived and overlap and peak <= gpu.total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal.two", description=__doc__)
    parser.add_argument("--model", default="qwen2-vl-2b")
    parser.add_argument("--on", default="1xrtx3090")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        return drive(args.drive)
    first, second = plans(args.model, args.on)
    with tempfile.TemporaryDirectory(prefix="turbofit-two-") as scratch:
        folder = Path(scratch)
        text, kept = report(first, second, folder, rehearse(first, second, folder))
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
