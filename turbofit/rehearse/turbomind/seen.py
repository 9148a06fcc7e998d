"""What TurboMind's own calls tell of an ended rehearsal; all sizes are bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from turbofit.core.plan import Settings
from turbofit.core.units import round_up
from turbofit.kernels.families import demangle, family
from turbofit.memory.account import POOL_WARMUP
from turbofit.memory.turbomind.cache import CacheShape, StatePart, tokens_planned
from turbofit.memory.turbomind.weights import load_constants
from turbofit.pretend.elf import Symbols
from turbofit.pretend.errors import PretendError
from turbofit.pretend.timeline import read_timeline
from turbofit.rehearse.packages import engine_library
from turbofit.rehearse.run import EndedRun, Seen
from turbofit.rehearse.turbomind.ledger import CallSites, Ledger

__all__ = ["NOT_KNOWN", "card_terms", "load_peak", "seen"]

NOT_KNOWN: Final = (
    "CUDA context",
    "kernel modules, loaded lazily",
    "NCCL's own buffers",
    "workspaces inside cuBLAS",
    "the driver's rounding of pools",
    "fragmentation of torch's allocator while loading",
)
#: A term of the ledger, and the call of the engine that allocates it after the cache.
_SITES: Final = {
    "attention": "UnifiedAttentionLayer::UnifiedAttentionLayer",
    "token_ids": "Generation::Impl::Impl",
    "sampling_buffers": "Sampling::Sampling",
    "guided_decoding": "GuidedDecoding::GuidedDecoding",
    "expert_routing": "MoeFfnDefaultImpl::Init",
    "gemm_workspace": "gemm::Workspace::Workspace",
    "l2_flush": "gemm::CacheFlushing::CacheFlushing",
}
#: Terms that are differences of what a card held in its phases.
_HELD: Final = {
    "weights": "weights",
    "kv_cache": "cache",
    "load_temporaries": "prepare",
    "buffers": "buffers",
    POOL_WARMUP: POOL_WARMUP,
}
#: What the lines about the cache have: its budget, its slabs, a sequence's state.
_CACHE_WORDS: Final = ("Object cache budget", "slab_size", "[GDN]")
#: How the pretend libraries begin what they say: why they end a process, among others.
_PRETEND: Final = "turbofit pretend:"
_SLAB: Final = re.compile(
    r"slab_size (\d+), object_size (\d+), object_count (\d+), ratio ([0-9.]+)"
)
#: What the pretend driver says of a kernel without code.
_EMPTY: Final = re.compile(r"no code for the kernel (\S+): it is empty")
_STATE: Final = re.compile(r"num_blocks=(\d+) block_bytes=(\d+)")


def seen(ended: EndedRun) -> Seen:
    """What the engine's calls say, from its timeline and its log.

    Raises:
        PretendError: the timeline is full.
    """
    ledger, cards = _ledger(ended), range(len(ended.spec.machine.gpus))
    settings = ended.notes.get("settings") or dict(ended.spec.settings)
    names = [case["name"] for case in ended.notes.get("cases", [])]
    held = [card_terms(ledger, i, ended.spec.machine.gpus[i].used) for i in cards]
    fatal = [one for one in ended.log if "[FATAL]" in one or one.startswith(_PRETEND)]
    said = fatal[-1] if fatal else ended.log[-1] if ended.log else ""
    error, death = ended.notes.get("error"), ledger.deaths[-1] if ledger.deaths else None
    if error and not fatal:
        at = error["frames"][-1].rpartition("/")[2] if error["frames"] else "?"
        said = f"{error['type']}: {error['message']} ({at})"
    phase, where = ledger.phases[-1], _EMPTY.sub(_family, said)
    if ended.stopped == "stuck":
        phase = "warm-up"
        where = "the cache is smaller than one warm-up request: the scheduler waits for ever"
    return Seen(
        phases=[_phases(ledger, i) for i in cards],
        terms=[_terms(ledger, i, held[i], names) for i in cards],
        cache=_cache(ledger, [x for x in ended.log if any(w in x for w in _CACHE_WORDS)], settings),
        cards=[
            _card(ledger, i) | {"held": held[i], "load_peak": load_peak(ledger, i)} for i in cards
        ],
        refused=death,
        phase=phase,
        where=where,
        message=fatal[-1] if fatal else "",
        pinned=ledger.pinned("peak"),
        more={
            "pinned_end": ledger.pinned("end"),
            "staging_peak": ended.notes.get("staging_peak"),
            "peer_refused": ledger.refused,
        },
    )


def _ledger(ended: EndedRun) -> Ledger:
    machine, pid = ended.spec.machine, ended.notes.get("pid")
    ledger = Ledger(len(machine.gpus), CallSites(Symbols(engine_library()).name), machine.pool_step)
    if any(usage.pid == pid and not usage.complete for usage in ended.ran.usages):
        raise PretendError(
            f"the timeline of {machine.timeline_limit} bytes is full",
            hint="rehearse fewer requests at once, or give the machine a timeline_limit",
        )
    timeline = ended.folder / "pretend" / "timelines" / f"{pid}.timeline"
    return ledger.read(read_timeline(timeline) if timeline.exists() else ())


def _family(match: re.Match[str]) -> str:
    """A kernel's mangled name in the words of `turbofit doctor --kernels`."""
    name = demangle(match[1])
    return f"no code for a kernel of the family {family(name) or name.partition('<')[0]!r}"


def _phases(ledger: Ledger, index: int) -> dict[str, dict[str, Any]]:
    card = ledger.cards[index]
    return {name: {"peak": card.peak.get(name, end), "held": end} for name, end in card.end.items()}


def _terms(
    ledger: Ledger, index: int, held: Mapping[str, int], cases: Sequence[str]
) -> dict[str, int]:
    """By line of the ledger: what a card held for it, or a case's executor pool at most."""
    pool = ledger.executor_pool(index)
    found = {name: held.get(key) for name, key in _HELD.items()}
    found |= {name: ledger.live(index, site=site) for name, site in _SITES.items()}
    found["symmetric_buffer"] = ledger.live(index, kind="VMM")
    if pool is not None:
        found |= {case: pool.live_peak.get(f"case {case}", 0) for case in cases}
    return {name: size for name, size in found.items() if size is not None}


def _cache(ledger: Ledger, lines: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
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


def _states(slabs: list[tuple[int, int]], lines: Sequence[str]) -> tuple[StatePart, ...]:
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
    pools = [pool for pool in ledger.pools.values() if pool.device == index]
    tallies = sorted(card.tallies.items())
    return {
        "pools": {pool.owner: asdict(pool) for pool in pools},
        "allocations": card.allocations,
        "sites": [place._asdict() | asdict(tally) for place, tally in tallies],
    }


def card_terms(ledger: Ledger, index: int, used: int) -> dict[str, int]:
    """What a card held when the engine was ready, by term, as far as the engine came.

    Args:
        ledger: read from the rehearsal's timeline.
        index: the card.
        used: bytes that the scenario says others hold.

    Returns:
        ``before`` (others), ``context`` (communicators), ``weights``, ``prepare`` (temporaries
        of weight preparation that are still held when free memory is read), ``cache``,
        ``pool_warmup`` (the executor pool's high-water mark), ``buffers`` (persistent, made after
        the cache), and ``steady``, their sum without the temporaries.
    """
    end = ledger.cards[index].end
    pools = [pool for pool in ledger.pools.values() if pool.device == index]
    default = [pool for pool in pools if pool.owner == "default"]  # of the weights
    executor = [pool for pool in pools if pool.owner == "executor"]
    held = {"before": used}
    with suppress(KeyError, IndexError):
        begun = end["import"] + sum(pool.held_end.get("context", 0) for pool in default)
        held["context"] = context = end["context"] - begun
        held["weights"] = weights = round_up(default[0].live_end["prepare"], ledger.pool_step)
        held["prepare"] = end["prepare"] - end["import"] - context - weights
        held["cache"] = end["cache"] - end["engine"]
        held[POOL_WARMUP] = executor[0].held_end["ready"]
        ready = end["ready"] - end["import"]
        held["buffers"] = ready - context - weights - held["cache"] - held[POOL_WARMUP]
        held["steady"] = ready + used
    return held


def load_peak(ledger: Ledger, index: int) -> int:
    """The most that a card held until its weights were ready, others not counted."""
    peak = ledger.cards[index].peak
    return max((peak.get(k, 0) for k in ("import", "context", "weights", "prepare")), default=0)
