"""Which constants of the presets kept results imply: memory's, each beside what is charged now.

Where several documents show one constant, what plans with less counts: the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.results import Results
from bench.gpu.terms import AFTER, BEFORE, after_cache, before_cache
from turbofit.core.plan import Plan
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.struct import NA
from turbofit.memory.account import HOPPER, POOL_WARMUP
from turbofit.memory.turbomind.weights import load_constants

MIB = 1 << 20
_TURBOMIND = "engines/turbomind-0.18.yaml"
#: What two readings of NVML differ by without a reason.
_NOISE = 2 * MIB
#: What a plain allocation takes at least.
_PAGE = 2 * MIB
_ENDS: dict[str, Callable[[Sequence[float]], float]] = {
    "high": max, "middle": statistics.median, "low": min,
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What one document says of one constant, in the preset's own unit.

    ``end``: ``high`` where too little kills, ``middle`` where it only ranks, ``low`` for the least.
    ``noise``: what it may
    be off by without a reason; ``share``: the same as a share of the value.
    """

    preset: str
    key: str
    value: float
    document: str
    end: str = "high"
    noise: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Implied:
    """A constant, as it is and as the documents have it."""

    preset: str
    key: str
    now: float | None
    value: float
    lowest: float
    documents: tuple[str, ...]
    changes: bool

    @property
    def impossible(self) -> bool:
        """A share above the whole: what was timed was no real card."""
        return self.key.split(".")[0].endswith("_efficiency") and self.value > 1

    @property
    def meaning(self) -> str:
        """What is wrong with it as it is."""
        if self.impossible:
            return "impossible: more than the card's peak"
        if not self.changes:
            return "holds"
        if self.now is None:
            return "missing"
        more = self.value > self.now
        if self.key == "context_mib.low":
            return "told in notes, charged nowhere"
        if self.preset == "engines/throughput.yaml":
            seconds = self.key.startswith(("layer_seconds", "step_seconds"))
            return "forecast too fast" if more == seconds else "forecast too slow"
        return "under: memory is not paid for" if more else "over: cache is wasted"


def memory_readings(results: Results) -> Iterator[Reading]:
    """Of one card."""
    yield from _card(results)
    yield from _contexts(results)
    yield from _handles(results)
    yield from _pools(results)
    yield from _trials(results)


def _marks(document: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    return {one["mark"]: one for one in (document or {}).get("marks", [])}


def _used(document: dict[str, Any] | None, names: Sequence[str]) -> int | None:
    """The most that NVML saw at some marks, beyond what was there before."""
    marks = _marks(document)
    found = [marks[name].get("used") for name in names if name in marks]
    return max((one for one in found if one), default=None)


def _card(results: Results) -> Iterator[Reading]:
    if results.preset is None:
        return
    file, gpu = f"gpus/{results.preset}.yaml", results.gpu
    for key, size in (("total_mib", gpu.total), ("reserved_mib", gpu.reserved)):
        if isinstance(size, int):
            yield Reading(file, f"{key}.value", size / MIB, "machine", noise=2.0)
    if isinstance(gpu.sm_count, int):
        yield Reading(file, "sm_count.value", gpu.sm_count, "machine")


def _contexts(results: Results) -> Iterator[Reading]:
    """``low`` without any library, ``high`` with TurboMind's."""
    if results.preset is None:
        return
    file, parts = f"gpus/{results.preset}.yaml", results.documents.get("a-context", {})
    low, high = _context(parts.get("plain")), _context(parts.get("turbomind"))
    if low is None:
        high, name = _context(results.documents.get("a-constants")), "a-constants"
        if high is None:
            high, name = _left_of_starts(results)
        if high is not None:
            yield Reading(file, "context_mib.high", _mib(high), name, noise=2.0)
    else:
        yield Reading(file, "context_mib.low", _mib(low), "a-context", "low", noise=2.0)
        whole = max(low, high or 0)
        yield Reading(file, "context_mib.high", _mib(whole), "a-context", noise=2.0)


def _left_of_starts(results: Results) -> tuple[int | None, str]:
    """The largest context that starts leave, handles and kernels as they are charged; and whose."""
    constants, found = load_constants(), [(0, "")]
    handles = constants.cublas_handles * constants.cublas_handle["hopper"]
    if results.gpu.compute_capability == NA or results.gpu.compute_capability < HOPPER:
        handles = constants.cublas_handles * constants.cublas_handle["default"]
    for name, document, plan in results.trials():
        before = before_cache(plan, document) if plan.engine.name == "turbomind" else None
        if before is not None:
            found.append((before - handles - constants.torch_kernels, name))
    size, name = max(found)
    return size or None, name


def _context(document: dict[str, Any] | None) -> int | None:
    """Of a process that did nothing else; a first allocation has a page of its own."""
    first = _used(document, ("first",))
    found = _used(document, ("context",)) or 0
    return max(found, (first or 0) - _PAGE) or None


def _mib(size: int) -> int:
    return -(-size // MIB)


def _handles(results: Results) -> Iterator[Reading]:
    """What all of a GPU's handles took, spread over them: cuBLAS's own kernels are in it."""
    took = _took(results)
    if took is not None:
        hopper = results.gpu.compute_capability != NA and results.gpu.compute_capability >= HOPPER
        key = f"cublas_handle.value.{'hopper' if hopper else 'default'}"
        count = load_constants().cublas_handles
        yield Reading(_TURBOMIND, key, round(took / count), "a-handles", noise=64 << 10)


def _took(results: Results) -> int | None:
    """By as many as one GPU has when free memory is read, and by what they take once used."""
    marks = _marks(results.documents.get("a-handles", {}).get("handles"))
    made, used = ({n: m for n, m in marks.items() if n.startswith(way)} for way in ("made", "used"))
    one = made.get(f"made_{load_constants().cublas_handles}")
    if one is None or not used:
        return None
    most = max(int(m["took"]) for m in made.values())
    return int(one["took"]) + max(int(m["took"]) for m in used.values()) - most


def _pools(results: Results) -> Iterator[Reading]:
    marks = _marks(results.documents.get("a-pool", {}).get("pool"))
    if "default_1_mib" in marks:
        taken = marks["default_1_mib"]["taken"]
        yield Reading(_TURBOMIND, "pool_granularity.value", taken, "a-pool")


def _trials(results: Results) -> Iterator[Reading]:
    """What was taken before the cache and after it that no rehearsal sees, less what is known."""
    constants, took = load_constants(), _took(results)
    context = _context(results.documents.get("a-context", {}).get("turbomind"))
    for name, document, plan in results.trials():
        if plan.engine.name != "turbomind":
            continue
        before, after = before_cache(plan, document), after_cache(plan, document)
        if before is not None and context is not None and took is not None:
            rest = before - context - took
            yield Reading(_TURBOMIND, "torch_kernels.value", rest, name, noise=_NOISE)
        if after is not None and document.get("outcome") == "survived":
            yield _holes(plan, after - constants.kernel_modules, name)


def _holes(plan: Plan, rest: int, name: str) -> Reading:
    """In pools: the most that there are, where the plan charges that, else the share of a case."""
    constants = load_constants()
    rule, step = constants.pool_growth, constants.pool_granularity
    pools = (t for t in plan.gpus[0].ledger if t.phase == "transient" or t.term == POOL_WARMUP)
    largest = max(term.bytes for term in pools)
    if plan.model.mrope and all(term.term != "mrope_pool" for term in plan.gpus[0].ledger):
        rest -= step  # of the engine thread's own pool, which plans before 0.1 had in this term
    if rule["share"] * largest >= rule["most"]:
        return Reading(_TURBOMIND, "pool_growth.value.most", rest, name, noise=step)
    share = step / largest
    return Reading(_TURBOMIND, "pool_growth.value.share", rest / largest, name, noise=share)


def value_of(preset: str, key: str) -> Any:
    """What a preset says now; None where it says nothing."""
    found: Any = load_yaml(presets_dir() / preset)
    for part in key.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def implied(readings: Iterable[Reading]) -> list[Implied]:
    """All readings of a constant as one, beside what it is now."""
    by_key: dict[tuple[str, str], list[Reading]] = {}
    for one in readings:
        by_key.setdefault((one.preset, one.key), []).append(one)
    found = []
    for (preset, key), many in sorted(by_key.items()):
        values = [one.value for one in many]
        value = _ENDS[many[0].end](values)
        now = value_of(preset, key)
        room = max(many[0].noise, many[0].share * abs(now or 0))
        documents = tuple(dict.fromkeys(one.document for one in many))
        changes = now is None or abs(value - now) > room
        found.append(Implied(preset, key, now, value, min(values), documents, changes))
    return found


def sums(results: Results) -> Iterator[tuple[str, str, int, int]]:
    """Terms that a trial shows together: stage, terms, charged and measured bytes."""
    for name, document, plan in results.trials():
        charged = {t.term: t.bytes for t in plan.gpus[0].ledger if t.basis == "estimate"}
        for what, measured, terms in (
            ("before the cache", before_cache(plan, document), BEFORE),
            ("after the cache", after_cache(plan, document), AFTER),
        ):
            if measured is not None:
                found = {term: charged[term] for term in terms if term in charged}
                yield name, f"{what}: {' + '.join(found)}", sum(found.values()), measured
