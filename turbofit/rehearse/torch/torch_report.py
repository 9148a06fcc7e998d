"""What a torch engine's rehearsal saw, as one JSON document; all sizes are bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from turbofit.core.json_types import Document
from turbofit.core.version import __version__
from turbofit.pretend.run import NOTICE
from turbofit.rehearse.torch.torch_death import outcome_and_death
from turbofit.rehearse.torch.torch_drivers import DRIVERS
from turbofit.rehearse.torch.torch_ledger import combined
from turbofit.rehearse.torch.torch_run import KEPT, EndedRehearsal

__all__ = ["NOT_KNOWN", "SCHEMA", "torch_report"]

SCHEMA: Final = "turbofit.rehearsal-torch/1"
BASIS: Final = (
    "each process's own timeline, marked in the process within 10 ms of the phase's begin, which "
    "waits for it; a card's peak in a phase is the sum of its processes' peaks, exact where one of "
    "them allocates; a card's peak of the run is that of one moment"
)
NOT_KNOWN: Final = (
    "private workspaces inside cuBLAS, cuDNN and NCCL",
    "kernel modules, loaded lazily",
    "what hangs on large float values: tokens, sampling, expert routing",
    "the CUDA context's size is the card's preset, charged to each process",
)


def torch_report(seen: EndedRehearsal, versions: Mapping[str, str], about: Document) -> Document:
    """The document.

    Args:
        seen: the rehearsal.
        versions: packages that took part.
        about: what the caller adds: model, machine, settings that were given, notes.
    """
    outcome, death = outcome_and_death(seen)
    told = seen.report
    cards = range(len(seen.ran.scenario.gpus))
    cases = [_case(seen, case) for case in told.get("cases", [])]
    if death is not None and not any(f"case {c['name']}" == death["phase"] for c in cases):
        running = str(death["phase"]).removeprefix("case ")
        if str(death["phase"]).startswith("case "):
            cases.append(_case(seen, {"name": running, "statuses": {}}))
    return {
        "schema": SCHEMA,
        "turbofit_version": __version__,
        "pretend": NOTICE,
        "engine": seen.spec.engine,
        **about,
        "outcome": outcome,
        "death": death,
        "seconds": seen.ran.seconds,
        "child_seconds": told.get("seconds", {}),
        "versions": dict(versions),
        "environment": {name: os.environ[name] for name in KEPT if name in os.environ},
        "settings": told.get("settings") or dict(seen.spec.settings),
        "device_map": told.get("device_map"),
        "executor": told.get("executor"),
        "cache": _cache(told),
        "gpus": [_card(seen, index) for index in cards],
        "cases": cases,
        "decides": _decides(cases, death),
        "processes": [
            {"pid": one.pid, "command": one.command, "contexts": _by_gpu(one.contexts)}
            for one in seen.held
            if one.contexts or one.spans
        ],
        "peak_rss": told.get("peak_rss"),
        "basis": BASIS,
        "not_known": list(NOT_KNOWN),
        "error": told.get("error"),
        "log": [line for line in seen.log.splitlines() if line.strip()][-12:],
    }


def _by_gpu(sizes: Mapping[int, int]) -> dict[str, int]:
    return {str(gpu): size for gpu, size in sizes.items()}


def _cache(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """LMDeploy's own CacheConfig; None where the start did not come so far."""
    cache = told.get("cache")
    if not cache:
        return None
    blocks, size = cache["num_gpu_blocks"] or 0, told.get("block_bytes") or []
    return {
        **cache,
        "free": told.get("free_at_sizing"),
        "block_bytes": size,
        "tokens": blocks * cache["block_size"],
        "bytes": [blocks * one for one in size],
        "session_len": told.get("session_len"),
    }


def _order(seen: EndedRehearsal) -> list[str]:
    return list(seen.report.get("seconds", {}))


def _torch(seen: EndedRehearsal, gpu: int, phase: str) -> dict[str, int] | None:
    """The allocator's own figures on a card in a phase, over all processes, if any were read."""
    rows = [
        row
        for record in seen.records
        for row in record["rows"]
        if row["gpu"] == gpu and row["phase"] == phase
    ]
    if not rows:
        return None
    names = ("requested", "allocated", "reserved", "allocated_peak", "reserved_peak", "retries")
    return {name: sum(row[name] for row in rows) for name in names}


def _free(seen: EndedRehearsal, gpu: int) -> int:
    card = seen.ran.scenario.gpus[gpu]
    return card.total - card.used


def _state(seen: EndedRehearsal, gpu: int, phase: str) -> dict[str, int | None]:
    """A card at the end of a phase: torch's allocator, the account, what was left."""
    order = _order(seen)
    torch = _torch(seen, gpu, phase) or {}
    held = combined(seen.held, gpu, phase, order).end
    return {
        "requested": torch.get("requested"),
        "allocated": torch.get("allocated"),
        "reserved": torch.get("reserved"),
        "held": held,
        "left": _free(seen, gpu) - held,
    }


def _card(seen: EndedRehearsal, gpu: int) -> dict[str, Any]:
    card, order = seen.ran.scenario.gpus[gpu], _order(seen)
    contexts = sum(one.contexts.get(gpu, 0) for one in seen.held)
    peak = seen.ran.shared.peak[gpu]
    data: dict[str, Any] = {
        "gpu": gpu,
        "name": card.name,
        "total": card.total,
        "used_by_others": card.used,
        "contexts": contexts,
        "processes": [one.pid for one in seen.held if gpu in one.contexts],
        "phases": {
            name: {
                "peak": combined(seen.held, gpu, name, order).peak,
                "torch": _torch(seen, gpu, name),
                **_state(seen, gpu, name),
            }
            for name in order
            if name not in ("import", "end")
        },
        "peak": peak,
        "left_at_peak": max(0, _free(seen, gpu) - peak),
    }
    loaded = DRIVERS[seen.spec.engine].loaded
    if loaded in order:
        weights = _state(seen, gpu, loaded)
        data["weights"] = weights | {"held": (weights["held"] or 0) - contexts}
    grown = [name for name in ("graph runner", "cache", "warm-up") if name in order]
    for name, before in zip(grown[1:], grown, strict=False):
        data[name] = _growth(_state(seen, gpu, before), _state(seen, gpu, name))
    last = "warm-up" if "warm-up" in order else loaded
    if "ready" in order:
        data["after_start"] = _state(seen, gpu, last)
    return data


def _growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int | None]:
    return {
        name: None if before[name] is None or after[name] is None else after[name] - before[name]
        for name in ("allocated", "reserved", "held")
    }


def _case(seen: EndedRehearsal, case: Mapping[str, Any]) -> dict[str, Any]:
    phase, order = f"case {case['name']}", _order(seen)
    rows = []
    for gpu in range(len(seen.ran.scenario.gpus)):
        torch = _torch(seen, gpu, phase) or {}
        held = combined(seen.held, gpu, phase, order).peak
        allocated, reserved = torch.get("allocated_peak"), torch.get("reserved_peak")
        idle = reserved - allocated if reserved is not None and allocated is not None else None
        left = max(0, _free(seen, gpu) - held)
        rows.append(
            {
                "gpu": gpu,
                "allocated_peak": allocated,
                "reserved_peak": reserved,
                "fragmentation": idle,
                "held_peak": held,
                "left": left,
                "margin": None if idle is None else left + idle,
                "retries": torch.get("retries"),
            }
        )
    return dict(case, gpus=rows)


def _decides(cases: list[dict[str, Any]], death: Mapping[str, Any] | None) -> str | None:
    """The case it died of, else the one whose tensors took most on a card, the first of equals.

    Reserved memory does not tell: torch keeps it from one case to the next.
    """
    if death is not None:
        died = str(death["phase"])
        return died.removeprefix("case ") if died.startswith("case ") else None
    if not cases:
        return None

    def most(case: Mapping[str, Any]) -> int:
        return max(int(row["allocated_peak"] or row["held_peak"]) for row in case["gpus"])

    return str(max(cases, key=most)["name"])
