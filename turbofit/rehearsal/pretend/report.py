"""The report of a command on a pretend machine, as one JSON document; sizes are bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from turbofit.core.engine_end import signal_name
from turbofit.core.json_types import Document
from turbofit.rehearsal.pretend.run import NOTICE, FinishedRun
from turbofit.rehearsal.pretend.usage import Peak, Process, Usage

SCHEMA = "turbofit.pretend-run/1"


def report(ran: FinishedRun) -> Document:
    """The document of a run, without processes that only counted the cards."""
    cards = range(len(ran.scenario.gpus))
    return {
        "schema": SCHEMA,
        "pretend": NOTICE,
        "command": list(ran.command),
        "exit_code": ran.exit_code,
        "signal": signal_name(-ran.code) if ran.code < 0 else None,
        "seconds": ran.seconds,
        "context": ran.scenario.context,
        "gpus": [{"gpu": index, **card_at_peak(ran, index)} for index in cards],
        "processes": [_process(p, u, len(cards)) for p, u in _pairs(ran) if p.used],
        "pinned_peak": ran.shared.pinned_peak,
        "allocations": ran.shared.allocations,
        "pinned_allocations": ran.shared.pinned_allocations,
        "refused": newest_refusal(ran),
    }


def _pairs(ran: FinishedRun) -> list[tuple[Process, Usage]]:
    """Pairs of a process and its timeline, in the order in which the processes of a pid ran."""
    usages: dict[int, list[Usage]] = {}
    for usage in ran.usages:
        usages.setdefault(usage.pid, []).append(usage)
    left = {pid: iter(ones) for pid, ones in usages.items()}
    return [
        (process, next(left.get(process.pid, iter(())), Usage(pid=process.pid)))
        for process in ran.shared.processes
    ]


def card_at_peak(ran: FinishedRun, index: int) -> Document:
    """The facts of a card, and the most bytes that all processes together held on it."""
    gpu, peak = ran.scenario.gpus[index], ran.shared.peak[index]
    return {
        "name": gpu.name,
        "total": gpu.total,
        "used_by_others": gpu.used,
        "peak": peak,
        "left_at_peak": max(0, gpu.total - gpu.used - peak),
    }


def _process(process: Process, usage: Usage, gpus: int) -> dict[str, Any]:
    rows = []
    for index in range(gpus):
        if not (process.peak[index] or process.context[index]):
            continue
        peak = usage.peaks.get(index, Peak())
        rows.append(
            {
                "gpu": index,
                "context": process.context[index],
                "peak": process.peak[index],
                "phase": peak.phase,
                "site": peak.site,
                "held_at_end": process.allocated[index],
                "at_combined_peak": process.at_peak[index],
                "phases": usage.phases.get(index, {}),
            }
        )
    return {
        "pid": process.pid,
        "parent": usage.parent,
        "command": usage.command,
        "gpus": rows,
        "pinned_peak": process.pinned_peak,
        "refused": len(usage.refused),
        "complete": usage.complete,
    }


def newest_refusal(ran: FinishedRun) -> Document | None:
    """The newest refused allocation of any process; None if no allocation was refused."""
    refusing = [(p, u) for p, u in _pairs(ran) if p.refused_at and u.refused]
    if not refusing:
        return None
    process, usage = max(refusing, key=lambda pair: pair[0].refused_at)
    facts = asdict(usage.refused[-1])
    count = sum(len(u.refused) for _, u in refusing)
    refusal = {"count": count, "pid": process.pid, "command": usage.command}
    return refusal | {"asked": facts.pop("requested")} | facts
