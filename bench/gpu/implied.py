"""Which constants of the presets kept results imply: memory's, each beside what is charged now.

Where several documents show one constant, what plans with less counts: the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bench.gpu.results import Results
from bench.gpu.terms import AFTER, BEFORE, after_cache, before_cache
from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.struct import NA
from turbofit.memory.shared_terms import HOPPER
from turbofit.memory.turbomind.constants import load_constants

__all__ = ["Implied", "Reading", "implied", "memory_readings", "sums", "value_of"]

MIB = 1 << 20
_TURBOMIND = "engines/turbomind-0.18.yaml"
#: What two readings of NVML differ by without a reason.
_NOISE = 2 * MIB
#: What a plain allocation takes at least.
_PAGE = 2 * MIB
_ENDS: dict[str, Callable[[Sequence[float]], float]] = {
    "high": max, "middle": statistics.median, "low": min,
}  # fmt: skip
#: Two steps of pools, and what a plan's pools differ by between them (on pretend GPUs, tp 1).
_FINE, _COARSE, _GROWN = 2 * MIB, 32 * MIB, 44 * MIB


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
    yield from _kernels(results)


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
        high = _context(results.documents.get("a-constants"))
        if high is not None:
            yield Reading(file, "context_mib.high", _mib(high), "a-constants", noise=2.0)
    else:
        yield Reading(file, "context_mib.low", _mib(low), "a-context", "low", noise=2.0)
        whole = max(low, high or 0)
        yield Reading(file, "context_mib.high", _mib(whole), "a-context", noise=2.0)
    # Whatever else was there when free memory was read is charged with the context.
    used = _took(results)
    count = load_constants().cublas_handles["first"]
    for name, document, plan in results.trials():
        took = before_cache(plan, document)
        if took is not None and count in used and plan.engine.name == "turbomind":
            rest = _mib(took - used[count])
            yield Reading(file, "context_mib.high", rest, name, noise=2.0)


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
    counts = load_constants().cublas_handles.values()
    each = [took[count] / count for count in counts if count in took]
    if each:
        hopper = results.gpu.compute_capability != NA and results.gpu.compute_capability >= HOPPER
        key = f"cublas_handle.value.{'hopper' if hopper else 'default'}"
        yield Reading(_TURBOMIND, key, round(max(each)), "a-handles", noise=64 << 10)


def _took(results: Results) -> dict[int, int]:
    """By how many handles there were, and were used; the most counts."""
    marks = _marks(results.documents.get("a-handles", {}).get("handles"))
    took: dict[int, int] = {}
    for name, one in marks.items():
        if name.startswith(("used_", "made_")):
            took[one["handles"]] = max(took.get(one["handles"], 0), int(one["took"]))
    return took


def _pools(results: Results) -> Iterator[Reading]:
    marks = _marks(results.documents.get("a-pool", {}).get("pool"))
    if "default_1_mib" in marks:
        taken = marks["default_1_mib"]["taken"]
        yield Reading(_TURBOMIND, "pool_granularity.value", taken, "a-pool")
    growth = _growth(results)
    if growth is not None:
        yield Reading(_TURBOMIND, "pool_growth.value", growth, "a-pool", noise=_NOISE)


def _growth(results: Results) -> int | None:
    """What pools of TurboMind's grow by beyond what was asked, by the largest of their steps.

    Steps of 32 MiB take `_GROWN` more than steps of 2 MiB; others lie in proportion.
    """
    marks = _marks(results.documents.get("a-pool", {}).get("pool"))
    if "growth" not in marks:
        return None
    seen = [0, *marks["growth"]["steps"]]
    step = max(int(after - before) for before, after in pairwise(seen))
    return round(_GROWN * max(0, step - _FINE) / (_COARSE - _FINE))


def _kernels(results: Results) -> Iterator[Reading]:
    """What came after the cache and no rehearsal sees, less the growth of pools."""
    capability = results.gpu.compute_capability
    if capability == NA:
        return
    images = load_constants().kernel_images
    wanted = capability[0] * 10 + capability[1]
    at = max((key for key in images if key <= wanted), default=max(images))
    growth = _growth(results)
    for name, document, plan in results.trials():
        if plan.engine.name != "turbomind" or document.get("outcome") != "survived":
            continue
        took = after_cache(plan, document)
        if took is None:
            continue
        charged = {t.term: t.bytes for t in plan.gpus[0].ledger}
        rest = took - (charged.get("pool_growth", 0) if growth is None else growth)
        yield Reading(
            _TURBOMIND, f"kernel_images.value.{at}", max(0, rest), name, noise=_NOISE + MIB
        )  # fmt: skip


def value_of(preset: str, key: str) -> Any:
    """What a preset says now; None where it says nothing."""
    found: Any = load_yaml(presets_dir() / preset)
    for part in key.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part, found.get(int(part)) if part.isdigit() else None)
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
