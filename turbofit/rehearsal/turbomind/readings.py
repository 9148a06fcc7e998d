"""Reads the memory and the end of TurboMind from an ended rehearsal; sizes are in bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from msgspec import convert

from turbofit.core.engine_end import AnyEnd
from turbofit.core.installation import installed
from turbofit.core.plan import Settings
from turbofit.core.struct import Document
from turbofit.core.units import round_up
from turbofit.logs.death import death
from turbofit.logs.log_events import Backpressure, Slab
from turbofit.logs.log_reader import read_line
from turbofit.memory.account import POOL_WARMUP, LoggedSlab
from turbofit.memory.engines import engine_named
from turbofit.rehearsal.pretend.process_memory import ProcessMemory
from turbofit.rehearsal.run import EndedRun, Readings

NOT_KNOWN: Final = (
    "CUDA context",
    "kernel modules, loaded lazily",
    "NCCL's own buffers",
    "workspaces inside cuBLAS",
    "the driver's rounding of pools",
    "fragmentation of torch's allocator while loading",
)
#: Terms of the ledger that the engine allocates after the cache; for each term the engine's call
#: or the kind of memory.
_SITES: Final = {
    "attention": "UnifiedAttentionLayer::UnifiedAttentionLayer",
    "token_ids": "Generation::Impl::Impl",
    "sampling_buffers": "Sampling::Sampling",
    "guided_decoding": "GuidedDecoding::GuidedDecoding",
    "expert_routing": "MoeFfnDefaultImpl::Init",
    "gemm_workspace": "gemm::Workspace::Workspace",
    "l2_flush": "gemm::CacheFlushing::CacheFlushing",
    "symmetric_buffer": "VMM",
}
#: Words of the log lines about the cache: its budget, its slabs, a sequence's state.
_CACHE_WORDS: Final = ("Object cache budget", "slab_size", "[GDN]")
#: Settings that decide the cache's size, and their values if the engine's settings have none.
_LIMITS: Final = {"cache_block_seq_len": 64, "max_batch_size": 1, "session_len": 1}
#: The beginning of each line that the pretend libraries print.
_PRETEND: Final = "turbofit pretend:"
_STATE: Final = re.compile(r"num_blocks=(\d+) block_bytes=(\d+)")


def read_run(ended: EndedRun) -> Readings:
    """Read from timeline and log how much memory each phase took, and how the rehearsal ended.

    Raises:
        PretendError: the timeline is incomplete.
    """
    memory = ended.ran.machine.memory_of(ended.notes.get("pid"))
    cards = range(len(ended.spec.machine.gpus))
    settings = ended.notes.get("settings") or dict(ended.spec.settings)
    names = [case["name"] for case in ended.notes.get("cases", [])]
    phases = [
        {name: {"peak": card.peak.get(name, end), "held": end} for name, end in card.end.items()}
        for card in memory.cards
    ]
    of_cache = [line for line in ended.log if any(word in line for word in _CACHE_WORDS)]
    return Readings(
        phases=phases,
        terms=[_terms(memory, i, names) for i in cards],
        cache=_cache(memory, of_cache, settings),
        cards=[
            {
                "pools": {pool.owner: asdict(pool) for pool in memory.of_card(i)},
                "load_peak": load_peak(memory, i),
            }
            for i in cards
        ],
        end=end_of(ended, memory),
        pinned=memory.pinned(),
    )


def end_of(ended: EndedRun, memory: ProcessMemory) -> Document:
    """Return the fields of an `AnyEnd` that say how a rehearsal ended.

    `outcome_and_end` ignores the fields if all requests were served.
    """
    fatal = [line for line in ended.log if "[FATAL]" in line or line.startswith(_PRETEND)]
    message, error = (fatal or ended.log or [""])[-1], ended.notes.get("error")
    if error and not fatal:
        place = error["frames"][-1].rpartition("/")[2] if error["frames"] else "?"
        message = f"{error['type']}: {error['message']} ({place})"
    events = [event for event in map(read_line, message.splitlines()) if event is not None]
    refused = memory.deaths[-1] if memory.deaths else {}
    phase, where = memory.phases[-1], message
    if ended.stopped == "stuck":
        events, refused, phase = [Backpressure(cause="memory")], {}, "warm-up"
        where = "the cache is smaller than one warm-up request: the scheduler waits for ever"
    elif events and isinstance(events[-1], Backpressure):
        events = []  # the engine waited before it ended, but the wait is not the cause
    account = convert({"phase": phase, "where": where, **refused}, AnyEnd) if refused else None
    engine = engine_named("turbomind", installed("lmdeploy"))
    kind = death(events, account=account, known=(engine, Settings())).kind
    end = {"kind": kind, "phase": phase, "where": where, "message": message if fatal else ""}
    return {**end, **refused}


def _terms(memory: ProcessMemory, index: int, cases: Sequence[str]) -> dict[str, int]:
    """Return the bytes of each ledger term that a card has, by the term's name.

    The transient term of a case is the peak of the executor's pool during the case.
    """
    pool, late = memory.executor_pool(index), memory.cards[index].late
    terms = card_terms(memory, index)
    terms |= {name: late[site] for name, site in _SITES.items() if site in late}
    if pool is not None:
        terms |= {case: pool.live_peak.get(f"case {case}", 0) for case in cases}
    return terms


def _cache(
    memory: ProcessMemory, lines: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the sizes of the cache, in bytes, and the number of tokens that the cache holds.

    For a model with gated delta nets, the states of a full batch are subtracted first, as in a
    plan.
    """
    # Each rank prints an equal line; equal lines count once.
    events = [event for event in map(read_line, lines) if isinstance(event, Slab)]
    slabs = list(dict.fromkeys(LoggedSlab(e.slab_size, e.object_size) for e in events))
    first_card, tokens = memory.cards[0], None
    if slabs and first_card.cache_region is not None:
        told = {name: int(settings.get(name) or least) for name, least in _LIMITS.items()}
        engine = engine_named("turbomind", installed("lmdeploy"))
        shape = engine.logged_cache([slabs[0], *_states(slabs, lines)], convert(told, Settings))
        if shape is not None:
            # The formula subtracts a page, since a plan does not know the region's address. Here
            # the address is known, so only the bytes before the first whole page are lost.
            region = first_card.cache_region - -first_card.cache_address % shape.page + shape.page
            tokens = shape.tokens(region)
    return {
        "free": [card.free_at_cache for card in memory.cards],
        "region": [card.cache_region for card in memory.cards],
        "object_size": slabs[0].object_bytes if slabs else None,
        "slab_size": slabs[0].slab_bytes if slabs else None,
        "tokens": tokens,
    }


def _states(slabs: Sequence[LoggedSlab], lines: Sequence[str]) -> Iterator[LoggedSlab]:
    """Yield the parts of one sequence's state of gated delta nets, as the engine logs them.

    A part that every layer has counts once for each layer; any other part counts once.
    """
    match = next((m for line in lines if (m := _STATE.search(line))), None)
    if match is None:
        return
    layers, size = int(match[1]), int(match[2])
    for slab in slabs if slabs[0].object_bytes == size else slabs[1:]:
        yield slab._replace(each=layers if slab.object_bytes == size else 1)


def card_terms(memory: ProcessMemory, index: int) -> dict[str, int]:
    """Return the bytes in use on a card when the engine was ready, by the name of the ledger term.

    If the engine ended earlier, the result lacks the terms of the later phases.
    """
    end = memory.cards[index].end
    # Of several pools of an owner the first counts.
    pools = {pool.owner: pool for pool in reversed(memory.of_card(index))}
    terms = {}
    with suppress(KeyError):
        default = pools["default"]  # the pool of the weights
        # Bytes in use on the card before the pool of the weights took any.
        before = end["context"] - default.held_end.get("context", 0)
        terms["weights"] = round_up(default.live_end["prepare"], memory.pool_step)
        terms["load_temporaries"] = end["prepare"] - before - terms["weights"]
        terms["kv_cache"] = end["cache"] - end["engine"]
        terms[POOL_WARMUP] = pools["executor"].held_end["ready"]
        rest = end["ready"] - before - terms["weights"]
        terms["buffers"] = rest - terms["kv_cache"] - terms[POOL_WARMUP]
    return terms


def load_peak(memory: ProcessMemory, index: int) -> int:
    """Return the most bytes in use on a card until the engine's weights were ready."""
    peak = memory.cards[index].peak
    return max((peak.get(k, 0) for k in ("import", "context", "weights", "prepare")), default=0)
