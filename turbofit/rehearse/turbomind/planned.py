"""From a plan to its rehearsal's specification, and from what was seen back to its ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from turbofit.core.json_types import Document
from turbofit.core.plan import End, GpuLedger, Plan, Term
from turbofit.memory.calibrated import BUFFERS, CONTEXT
from turbofit.memory.shared_terms import POOL_WARMUP
from turbofit.pretend.documents import from_builtins
from turbofit.pretend.from_machine import pretend_twin
from turbofit.rehearse.promises import refused_in
from turbofit.rehearse.turbomind.spec import RehearsalCase, Spec
from turbofit.rehearse.turbomind.worst import NEW_TOKENS, worst_cases

# Terms of the ledger that exist on a real card only: charged to the pretend one beforehand.
_BEFORE_CACHE = ("cuda_context", "cublas", CONTEXT)
_AFTER_CACHE = ("kernel_modules", "pool_growth", BUFFERS)

# A term of the ledger, and the call of the engine (and its phase) that allocates it.
_SITES = {
    "attention": "UnifiedAttentionLayer::UnifiedAttentionLayer",
    "token_ids": "Generation::Impl::Impl",
    "sampling_buffers": "Sampling::Sampling",
    "guided_decoding": "GuidedDecoding::GuidedDecoding",
    "expert_routing": "MoeFfnDefaultImpl::Init",
    "gemm_workspace": "gemm::Workspace::Workspace",
    "l2_flush": "gemm::CacheFlushing::CacheFlushing",
}

# Terms that are made in one call of the engine, under the name of their common line.
_TOGETHER = {"attention_workspace": "attention", "block_pointers": "attention"}

# Lines that are a term of the rehearsal's own document.
_TERMS = {
    "weights": "weights",
    "kv_cache": "cache",
    "load_temporaries": "prepare",
    POOL_WARMUP: POOL_WARMUP,
}


def plan_spec(plan: Plan, checkpoint: Path, group: int = 0) -> Spec:
    """The specification of a plan's rehearsal, for one of its groups of GPUs.

    What a rehearsal cannot see is taken from the plan's ledger and charged to the pretend cards:
    the CUDA context, cuBLAS and NCCL before the cache is sized, kernel modules and the steps of
    real pools after it.
    """
    indices = plan.parallel.groups[group]
    twin = pretend_twin(plan.machine, indices)
    hidden = [*_BEFORE_CACHE]
    if plan.settings.communicator == "nccl":
        hidden.append("communicator")
    ledgers = {ledger.index: ledger.ledger for ledger in plan.gpus}
    # A correction may take back more than these: then of what the engine itself takes.
    gpus = tuple(
        dataclasses.replace(
            gpu,
            used=gpu.used + max(0, _sum(ledgers[index], hidden)),
            late=max(0, _sum(ledgers[index], _AFTER_CACHE)),
        )
        for gpu, index in zip(twin.gpus, indices, strict=True)
    )
    settings = {k: v for k, v in plan.lmdeploy_settings().items() if v is not None}
    cases = from_builtins(worst_cases(plan), tuple[RehearsalCase, ...])
    return Spec(dataclasses.replace(twin, gpus=gpus), checkpoint, settings, cases)


def _sum(terms: Sequence[Term], names: Sequence[str]) -> int:
    return sum(term.bytes for term in terms if term.term in names)


def unanswered(plan: Plan, document: Document) -> End | None:
    """The first case of which the engine refused a request that the plan promises to serve.

    None: there is none. The plan itself refuses what is longer than its longest request.
    """
    longest = min(plan.settings.session_len, plan.kv.longest_request_tokens) - NEW_TOKENS
    cases = document["cases"]
    ends = (refused_in(case, sum(n > longest for n in case["tokens"])) for case in cases)
    return next((end for end in ends if end is not None), None)


class LedgerRow(NamedTuple):
    """One line of a comparison, in bytes of one GPU; the difference is rehearsed - forecast."""

    gpu: int
    term: str
    forecast: int
    rehearsed: int

    @property
    def difference(self) -> int:
        """Above zero: the engine took more than was forecast."""
        return self.rehearsed - self.forecast


def compare(plan: Plan, document: Document, group: int = 0) -> list[LedgerRow]:
    """Forecast and rehearsal side by side, term by term where the engine's calls tell them apart.

    Args:
        plan: what was rehearsed.
        document: what ``turbofit.rehearse.turbomind.probe.rehearse`` returned.
        group: the group of GPUs that was rehearsed.
    """
    ledgers = {ledger.index: ledger.ledger for ledger in plan.gpus}
    rows: list[LedgerRow] = []
    for card, index in enumerate(plan.parallel.groups[group]):
        seen, done = _lookup(document, card), set()
        for term in ledgers[index]:
            name = _line(term)
            if name is None or name in done:
                continue
            done.add(name)
            rehearsed = seen(name)
            if rehearsed is not None:
                forecast = sum(t.bytes for t in ledgers[index] if _line(t) == name)
                rows.append(LedgerRow(index, name, forecast, rehearsed))
    return rows


def _line(term: Term) -> str | None:
    """The comparison's line that a term belongs to; None for what no rehearsal can see."""
    if term.basis == "estimate" or term.phase == "before" or term.term.endswith(".returned"):
        return None
    if term.term.startswith("weights."):
        return "weights"
    return _TOGETHER.get(term.term, term.term)


def rehearsed_ledgers(plan: Plan, document: Document, group: int = 0) -> tuple[GpuLedger, ...]:
    """The plan's ledgers with ``rehearsed`` beside ``bytes`` where the engine's calls tell.

    Terms that share one call of the engine, and those that only a real card has, stay without.
    """
    place = {index: i for i, index in enumerate(plan.parallel.groups[group])}

    def beside(gpu: GpuLedger) -> GpuLedger:
        seen = _lookup(document, place[gpu.index])
        terms = (
            replace(t, rehearsed=seen(t.term)) if _line(t) == t.term else t for t in gpu.ledger
        )
        return replace(gpu, ledger=tuple(terms))

    return tuple(beside(gpu) if gpu.index in place else gpu for gpu in plan.gpus)


def _lookup(document: Mapping[str, Any], card: int) -> Callable[[str], int | None]:
    terms, sites = document["terms"][card], document["gpus"][card]["sites"]
    cases = {case["name"]: case for case in document["cases"]}

    def seen(name: str) -> int | None:
        found: int | None = None
        if name in _TERMS:
            found = terms[_TERMS[name]]
        elif name in cases:
            held = cases[name]["executor"]
            found = held[card]["live_peak"] if len(held) > card else None
        elif name == "symmetric_buffer":
            found = _live(sites, lambda row: bool(row["kind"] == "VMM"))
        elif name in _SITES:
            found = _live(sites, lambda row: bool(row["site"] == _SITES[name]))
        return found

    return seen


def _live(rows: Sequence[Mapping[str, Any]], wanted: Callable[[Any], bool]) -> int | None:
    """Device bytes that are live for good after the cache, of the rows wanted."""
    found = [
        int(row["live_end"])
        for row in rows
        if row["phase"] in ("buffers", "warm-up") and row["kind"] != "pinned host" and wanted(row)
    ]
    return sum(found) if found else None
