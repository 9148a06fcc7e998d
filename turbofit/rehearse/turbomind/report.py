"""What a rehearsal saw, as one JSON document; all sizes are bytes."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from typing import Any

from turbofit.core.json_types import Document
from turbofit.core.plan import Settings
from turbofit.core.struct import to_builtins
from turbofit.kernels.families import demangle, family
from turbofit.memory.turbomind.cache import CacheShape, StatePart, tokens_planned
from turbofit.memory.turbomind.constants import load_constants
from turbofit.rehearse.installed import engine_version
from turbofit.rehearse.ledger_terms import card_terms, executor_pool, load_peak
from turbofit.rehearse.moments import moments
from turbofit.rehearse.turbomind.ledger import Ledger
from turbofit.rehearse.turbomind.run import ChildOutcome
from turbofit.rehearse.turbomind.spec import Spec

_SLAB = re.compile(r"slab_size (\d+), object_size (\d+), object_count (\d+), ratio ([0-9.]+)")
#: What the pretend driver says of a kernel without code.
_EMPTY = re.compile(r"no code for the kernel (\S+): it is empty")
_STATE = re.compile(r"num_blocks=(\d+) block_bytes=(\d+)")

NOT_KNOWN = (
    "CUDA context",
    "kernel modules, loaded lazily",
    "NCCL's own buffers",
    "workspaces inside cuBLAS",
    "the driver's rounding of pools",
    "fragmentation of torch's allocator while loading",
)


def report(spec: Spec, outcome: ChildOutcome, ledger: Ledger) -> Document:
    """The document: outcome, death, cards, cache, pool, pinned host memory, seconds."""
    what, death = outcome_and_death(outcome, ledger)
    settings = outcome.report.get("resolved") or dict(spec.settings)
    cache = _cache(ledger, outcome.budgets, settings)
    return {
        "schema": "turbofit.pretend-probe/1",
        "pretend": "memory only: nothing was computed and no GPU was used",
        "outcome": what,
        "death": death,
        "engine_version": engine_version(),
        "seconds": outcome.seconds,
        "child_seconds": outcome.report.get("seconds", {}),
        "not_known": list(NOT_KNOWN),
        "settings": settings,
        "cache": cache,
        "terms": [
            card_terms(ledger, i, spec.machine.gpus[i].used) for i in range(len(ledger.cards))
        ],
        "gpus": [_card(ledger, i) for i in range(len(ledger.cards))],
        "pinned": {"end": _pinned(ledger, "end"), "peak": _pinned(ledger, "peak")},
        "cases": [_case(ledger, c) for c in outcome.report.get("cases", [])],
        "timeline": [to_builtins(one) for one in moments(ledger.cards, spec.machine.gpus)],
        "load_peak": [load_peak(ledger, i) for i in range(len(ledger.cards))],
        "staging_peak": outcome.report.get("staging_peak"),
        "peer_refused": ledger.refused,
        "error": outcome.report.get("error"),
        "peak_rss": outcome.report.get("peak_rss"),
        "log": outcome.fatal + outcome.budgets[:8] + outcome.log[-12:],
    }


def outcome_and_death(outcome: ChildOutcome, ledger: Ledger) -> tuple[str, Document | None]:
    """What a child's end means: served, out_of_memory, hang or failed; and its death.

    ``served`` means that every request came to an end: a prompt that the cache cannot hold is
    refused by the engine and shows in its case's statuses.
    """
    last = ledger.phases[-1]
    if outcome.ended == "hang":
        where = "the cache is smaller than one warm-up request: the scheduler waits for ever"
        return "hang", _death("warm-up", where)
    if outcome.ended == "timeout":
        return "hang", _death(last, "nothing happened any more")
    if outcome.ended == "exit" and outcome.code == 0 and outcome.report.get("done"):
        unfinished = [c["name"] for c in outcome.report["cases"] if not c["finished"]]
        if not unfinished:
            return "served", None
        return "hang", _death(f"case {unfinished[0]}", "not finished in time")
    if ledger.deaths:
        return "out_of_memory", ledger.deaths[-1] | {"ended": _ended(outcome)}
    return "failed", _death(last, _last_words(outcome)) | {"ended": _ended(outcome)}


def _death(phase: str, where: str) -> dict[str, Any]:
    """The death where no refused allocation explains it."""
    return {"phase": phase, "where": where, "asked": None, "left": None}


def _ended(outcome: ChildOutcome) -> str:
    if outcome.ended == "signal":
        return signal.Signals(outcome.code).name
    return f"{outcome.ended} {outcome.code}"


def _last_words(outcome: ChildOutcome) -> str:
    if outcome.fatal:
        return _EMPTY.sub(_family, outcome.fatal[-1])
    error = outcome.report.get("error")
    if error:
        return f"{error['type']}: {error['message']} ({error['where']})"
    return outcome.log[-1] if outcome.log else ""


def _family(match: re.Match[str]) -> str:
    """A kernel's mangled name in the words of `turbofit doctor --kernels`."""
    name = demangle(match[1])
    return f"no code for a kernel of the family {family(name) or name.partition('<')[0]!r}"


def _cache(ledger: Ledger, lines: list[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cache's sizing; tokens are cut as the engine's page and slab allocators cut them.

    For a hybrid model the states of a full batch are taken off first, as in a plan.
    """
    # Each rank says the same.
    found = [(int(m[1]), int(m[2])) for line in lines if (m := _SLAB.search(line))]
    slabs = list(dict.fromkeys(found))
    data: dict[str, Any] = {
        "free": [card.free_at_cache for card in ledger.cards],
        "region": [card.cache_region for card in ledger.cards],
        "object_size": None,
        "slab_size": None,
        "tokens": None,
    }
    if slabs:
        slab, size = slabs[0]
        data.update(slab_size=slab, object_size=size)
        first = ledger.cards[0]
        if first.cache_region is not None:
            shape = CacheShape(
                block_bytes=size,
                block_tokens=int(settings.get("cache_block_seq_len") or 64),
                slab_bytes=slab,
                blocks_per_slab=slab // size,
                states=_states(slabs, lines),
            )
            constants = load_constants()
            page = constants.page_size
            region = first.cache_region - -first.cache_address % page + page
            batch, session = (int(settings.get(k) or 1) for k in ("max_batch_size", "session_len"))
            limits = Settings(max_batch_size=batch, session_len=session)
            data["tokens"] = tokens_planned(region, shape, constants, limits)
    return data


def _states(slabs: list[tuple[int, int]], lines: list[str]) -> tuple[StatePart, ...]:
    """A sequence's state as the engine registered it: a part once, another one for each layer."""
    found = next((m for line in lines if (m := _STATE.search(line))), None)
    if found is None:
        return ()
    layers, size = int(found[1]), int(found[2])
    counts = [layers if one == size else 1 for _, one in slabs]
    if slabs[0][1] != size:
        slabs, counts = slabs[1:], counts[1:]
    return tuple(
        StatePart(count=count, object_bytes=one, slab_bytes=slab)
        for (slab, one), count in zip(slabs, counts, strict=True)
    )


def _card(ledger: Ledger, index: int) -> dict[str, Any]:
    card = ledger.cards[index]
    pools = {
        pool.owner: {
            "live_peak": pool.live_peak,
            "live_end": pool.live_end,
            "held_end": pool.held_end,
        }
        for pool in ledger.pools.values()
        if pool.device == index
    }
    rows = [
        {
            "phase": place.phase,
            "kind": place.kind,
            "site": place.site,
            "count": tally.count,
            "bytes": tally.total,
            "live_end": tally.live,
            "live_peak": tally.peak,
        }
        for place, tally in sorted(card.tallies.items())
    ]
    return {
        "held_end": card.end,
        "held_peak": card.peak,
        "pools": pools,
        "allocations": card.allocations,
        "sites": rows,
    }


def _pinned(ledger: Ledger, what: str) -> dict[str, int]:
    """Page-locked host memory of the process by phase: the sum of the ranks' ends or peaks."""
    total: dict[str, int] = {}
    for card in ledger.cards:
        for phase, size in (card.pinned_end if what == "end" else card.pinned_peak).items():
            total[phase] = total.get(phase, 0) + size
    return total


def _executor(ledger: Ledger, phase: str) -> list[dict[str, int]]:
    pools = [executor_pool(ledger, i) for i in range(len(ledger.cards))]
    return [
        {"live_peak": p.live_peak.get(phase, 0), "held": p.held_end.get(phase, 0)}
        for p in pools
        if p is not None
    ]


def _case(ledger: Ledger, case: dict[str, Any]) -> dict[str, Any]:
    phase = f"case {case['name']}"
    return dict(
        case,
        peak=[card.peak.get(phase) for card in ledger.cards],
        end=[card.end.get(phase) for card in ledger.cards],
        executor=_executor(ledger, phase),
        pinned=sum(card.pinned_peak.get(phase, 0) for card in ledger.cards),
    )
