"""Reads torch's records and the account of an ended rehearsal. Sizes are in bytes.

A card's peak in a phase is the sum of its processes' peaks. This sum is exact if only one process
allocates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from turbofit.core.struct import Document, Struct
from turbofit.logs.death import death
from turbofit.logs.log_events import NoCache
from turbofit.logs.log_reader import read_line
from turbofit.machine.torch_memory import TorchMemory
from turbofit.memory.account import POOL_WARMUP
from turbofit.rehearsal.notes import DEAD
from turbofit.rehearsal.run import EndedRun, Readings
from turbofit.rehearsal.torch.phase_recorder import read_records

NOT_KNOWN: Final = (
    "private workspaces inside cuBLAS, cuDNN and NCCL",
    "kernel modules, loaded lazily",
    "everything that depends on large float values: tokens, sampling, expert routing",
    "the CUDA context's size is the card's preset, charged to each process",
)
_COUNTERS: Final = (
    "requested", "allocated", "reserved", "allocated_peak", "reserved_peak", "retries",
)  # fmt: skip
_OOM: Final = re.compile(r"OutOfMemoryError: (CUDA out of memory\..*)")
_NOT_THEIRS: Final = (
    "/torch/",
    "/turbofit/rehearsal/",
    "turbofit_values",
)
_MOST_FRAMES: Final = 4


def read_run(ended: EndedRun) -> Readings:
    """Return the memory of each phase of a rehearsal on torch, and how the rehearsal ended.

    The figures are from torch's allocator and the account of the pretend machine.
    """
    notes, cards = ended.notes, range(len(ended.spec.machine.gpus))
    memories, records = ended.ran.machine.memories, read_records(ended.folder)
    order = [name for name in notes.get("seconds", {}) if name not in ("import", "end")]
    phases: list[dict[str, dict[str, Any]]] = [{} for _ in cards]
    for gpu in cards:
        for name in order:
            spans = [memory.cards[gpu].span(name, order) for memory in memories]
            row = {"peak": sum(peak for peak, _ in spans), "held": sum(end for _, end in spans)}
            phases[gpu][name] = row | _counters(records, gpu, name)
    cache = _cache(notes, len(cards))
    return Readings(
        phases=phases,
        terms=[_terms(notes, phases[gpu], cache["region"][gpu]) for gpu in cards],
        cache=cache,
        cards=[
            ended.ran.machine.card_at_peak(gpu)
            | {"contexts": sum(memory.cards[gpu].context for memory in memories)}
            for gpu in cards
        ],
        end=end_of(ended),
    )


def _counters(records: list[Any], gpu: int, phase: str) -> dict[str, int]:
    """Return the sums of the processes' counters of torch's allocator; empty without a record."""
    rows = [
        row
        for record in records
        for row in record["rows"]
        if row["gpu"] == gpu and row["phase"] == phase
    ]
    return {name: sum(row[name] for row in rows) for name in _COUNTERS} if rows else {}


def _cache(notes: Mapping[str, Any], cards: int) -> dict[str, Any]:
    """Return the cache as in LMDeploy's CacheConfig; a size is None if the child noted no size."""
    cache, sizes = notes.get("cache") or {}, notes.get("block_bytes") or []
    blocks = cache.get("num_gpu_blocks") or 0
    return {
        **cache,
        "free": notes.get("free_at_sizing") or [None] * cards,
        "region": [blocks * size for size in sizes] or [None] * cards,
        "object_size": next(iter(sizes), None),
        "slab_size": None,
        "tokens": blocks * cache["block_size"] if cache else None,
        "session_len": notes.get("session_len"),
    }


def _terms(
    notes: Mapping[str, Any], phases: Mapping[str, Mapping[str, Any]], region: int | None
) -> dict[str, int]:
    """Return the bytes of each ledger term that torch's counters measure, by the term's name."""
    terms = {} if region is None else {"kv_cache": region}
    loaded = phases.get("sizing") or phases.get("load") or {}
    if "requested" in loaded:
        terms["weights"] = loaded["requested"]
        terms["load_fragmentation"] = loaded["reserved"] - loaded["requested"]
    before, ready = phases.get("cache", {}), phases.get("ready", {})
    if "reserved" in before and "reserved" in ready:
        # Only idle memory counts: what stays allocated belongs to cuBLAS and the CUDA graphs.
        terms[POOL_WARMUP] = (ready["reserved"] - ready["allocated"]) - (
            before["reserved"] - before["allocated"]
        )
    return terms | _case_terms(notes.get("cases", ()), phases)


def _case_terms(
    cases: Sequence[Mapping[str, Any]], phases: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """Return the transient bytes of each case: its most allocated bytes without the steady bytes.

    The steady bytes are the least that a served case left allocated, so a leak in one case does not
    count. The cuBLAS workspace of the first request is steady: it has a term of its own.
    """
    ready = phases.get("ready", {})
    if "allocated" not in ready:
        return {}
    by_case = {case["name"]: phases.get(f"case {case['name']}", {}) for case in cases}
    served = [by_case[case["name"]] for case in cases if set(case["statuses"]) == {"finished"}]
    ends = [phase["allocated"] for phase in served if "allocated" in phase]
    steady = max(ready["allocated"], min(ends, default=0))
    return {
        name: phase["allocated_peak"] - steady
        for name, phase in by_case.items()
        if phase.get("allocated_peak") is not None
    }


def end_of(ended: EndedRun) -> Document:
    """Return the fields of an `End` that say how a rehearsal ended.

    The fields are not used if all requests were served.
    """
    error = ended.notes.get("error")
    dead = [case for case in ended.notes.get("cases", []) if DEAD & set(case["statuses"])]
    phase = f"case {dead[0]['name']}" if dead else (error or ended.notes).get("phase", "import")
    message = _words(error, ended.log)
    where = " < ".join(_frames_of(error)) or message[:200]
    events = _events(message)
    end = {"kind": death(events).kind, "phase": phase, "where": where, "message": message}
    if any(isinstance(event, TorchMemory) for event in events):
        refusal = ended.ran.machine.newest_refusal() or {}
        sizes = {name: refusal.get(name) for name in ("gpu", "asked", "left", "simulated")}
        end |= {"missing": refusal.get("short"), "where": refusal.get("site") or where, **sizes}
    return end


def _events(message: str) -> list[Struct]:
    """Return the events that the lines of a message are read as."""
    return [event for event in map(read_line, message.splitlines()) if event is not None]


def _words(error: dict[str, Any] | None, lines: Sequence[str]) -> str:
    """Return the message of the error that ended the engine.

    Torch's message about a lack of memory goes before all others.
    """
    if error and any(isinstance(event, TorchMemory) for event in _events(error["message"])):
        return str(error["message"])
    for line in reversed(lines):
        if match := _OOM.search(line):
            return match[1]
        if isinstance(event := read_line(line), NoCache):
            return f"No enough gpu memory for {event.what}."
    if error:
        return f"{error['type']}: {error['message']}"
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _frames_of(error: dict[str, Any] | None) -> list[str]:
    """Return the innermost frames of an error that are outside torch and turbofit."""
    frames = list(reversed(error["frames"])) if error else []
    theirs = [frame for frame in frames if not any(part in frame for part in _NOT_THEIRS)]
    short = (frame.rpartition("site-packages/")[2] or frame for frame in theirs or frames)
    return [*short][:_MOST_FRAMES]
