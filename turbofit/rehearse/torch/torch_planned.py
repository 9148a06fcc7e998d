"""Rehearses a plan with the PyTorch engine, and compares what the engine held with the forecast."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.json_types import Document
from turbofit.core.plan import (
    End,
    GpuLedger,
    Plan,
    Rehearsal,
    RehearsedCache,
    RehearsedCase,
    Term,
)
from turbofit.memory.calibrated import BUFFERS
from turbofit.memory.pytorch.cache import engine_bound
from turbofit.memory.pytorch.constants import environment
from turbofit.memory.shared_terms import POOL_WARMUP
from turbofit.memory.vision_load import vision_load_within
from turbofit.pretend.from_machine import pretend_twin
from turbofit.pretend.scenario import Scenario
from turbofit.rehearse.checkpoint.draft_twin import speculative_of
from turbofit.rehearse.checkpoint.twin import carries_limit, checkpoint_for
from turbofit.rehearse.mixes import let_through
from turbofit.rehearse.moments import torch_moments
from turbofit.rehearse.promises import broken_promise, refused_in
from turbofit.rehearse.torch.torch_image_overlap import ServerRoom
from turbofit.rehearse.torch.torch_report import NOT_KNOWN, torch_report
from turbofit.rehearse.torch.torch_run import need_kernels, need_packages, run_torch
from turbofit.rehearse.torch.torch_spec import TorchCase, TorchSpec
from turbofit.rehearse.torch.torch_worst import rehearsed_size, torch_cases

__all__ = [
    "beside",
    "planned_cases",
    "planned_document",
    "planned_scenario",
    "planned_spec",
    "rehearse_pytorch_plan",
    "unanswered",
]

#: Terms of the ledger that no rehearsal sees: charged to the pretend cards beforehand. The context
#: of the process that runs the engine is charged by the account itself.
_BEFORE: Final = ("communicator",)
_AFTER: Final = ("kernel_modules", BUFFERS)
#: Prompts that meet, nearly always: blocks of the cache that are filled in part.
_CUT: Final = 4
_OUTCOMES: Final = {"served": "served", "out_of_memory": "out_of_memory", "hang": "hang"}


def rehearse_pytorch_plan(plan: Plan, group: int = 0) -> Plan:
    """The plan with what the engine did in its worst cases, on one group of GPUs.

    Raises:
        PackageError: torch is no CUDA build, or another package is missing.
        UsageError: only the model's own checkpoint would do, and it is not on disk.
    """
    document = planned_document(plan, group)
    rehearsal = replace(
        _rehearsal(document), timeline=torch_moments(document, planned_scenario(plan, group).gpus)
    )
    refused = unanswered(plan, document) if rehearsal.outcome == "served" else None
    if refused is not None:
        rehearsal = replace(rehearsal, outcome="failed", death=refused)
    return replace(plan, gpus=beside(plan, document, group), rehearsal=rehearsal)


def unanswered(plan: Plan, document: Document) -> End | None:
    """What the plan promises and the engine that served did not take; None: it took all.

    The longest prompt is as long as the engine takes one, which may be shorter than promised. The
    plan itself refuses what is longer than its longest request.
    """
    longest = min(plan.settings.session_len, plan.kv.longest_request_tokens)
    taken = (document["cache"] or {}).get("session_len")
    if taken is not None and taken < longest:
        why = f"the engine takes {taken:,} tokens of the {longest:,} that the plan promises"
        return broken_promise("text_prefill", why)
    promised = (case for case in document["cases"] if case["prompt_tokens"] <= longest)
    ends = (refused_in(case, 0) for case in promised)
    return next((end for end in ends if end is not None), None)


def planned_document(plan: Plan, group: int = 0) -> Document:
    """All that was seen of one of a plan's groups in its worst cases, as ``torch_report`` tells it.

    Raises:
        PackageError: torch is no CUDA build, or another package is missing.
        UsageError: only the model's own checkpoint would do, and it is not on disk.
    """
    ray = plan.settings.tp > 1 and plan.settings.distributed_executor_backend in (None, "ray")
    versions = need_packages("pytorch", ray=ray)
    need_kernels(plan.model.text)
    with tempfile.TemporaryDirectory(prefix="turbofit-rehearsal-") as scratch:
        seen = run_torch(planned_spec(plan, Path(scratch)), planned_scenario(plan, group))
    return torch_report(seen, versions, {})


def planned_spec(plan: Plan, scratch: Path) -> TorchSpec:
    """What a rehearsal of the plan drives; a stand-in checkpoint is made in ``scratch``.

    Raises:
        UsageError: only the model's own checkpoint would do, and it is not on disk.
    """
    # Chat templates are chosen by the folder's name, so the twin keeps the model's.
    model, draft = _limited(plan), plan.settings.draft
    folder = checkpoint_for(model, scratch / plan.model.name, draft=draft)
    settings = {k: v for k, v in plan.lmdeploy_settings().items() if v is not None}
    environ = environment(plan.settings, plan.model)
    speculative = speculative_of(draft, model, scratch)
    return TorchSpec(
        "pytorch", folder, settings, planned_cases(plan), environ=environ, speculative=speculative
    )


def planned_scenario(plan: Plan, group: int = 0) -> Scenario:
    """The pretend machine of one group, charged with what a rehearsal cannot see."""
    indices = plan.parallel.groups[group]
    twin = pretend_twin(plan.machine, indices)
    ledgers = [next(one.ledger for one in plan.gpus if one.index == index) for index in indices]
    gpus = tuple(
        dataclasses.replace(
            gpu, used=gpu.used + _sum(ledger, _BEFORE), late=max(0, _sum(ledger, _AFTER))
        )
        for gpu, ledger in zip(twin.gpus, ledgers, strict=True)
    )
    context = max(_sum(ledger, ("cuda_context",)) for ledger in ledgers)
    return dataclasses.replace(twin, gpus=gpus, context=context)


def _limited(plan: Plan) -> Any:
    """The model with the planned limit as its own, where its stand-in is written with it."""
    rule, limit = plan.model.image_rule, plan.limits.image_limit
    if rule is None or limit is None or not carries_limit(plan.model):
        return plan.model
    return replace(plan.model, image_rule=rule.with_limit(limit))


def planned_cases(plan: Plan) -> tuple[TorchCase, ...]:
    """The worst cases of a plan, as its gateway lets them through."""
    limits, settings, rule = plan.limits, plan.settings, _limited(plan).image_rule
    size = None
    if limits.vision_unit is not None and limits.images_per_request:
        size = plan.workload.image_size or rehearsed_size(rule, limits.image_limit)
    gate = None
    if rule is not None:
        gate = let_through(limits, engine_bound(rule, vision_load_within(limits), settings))
    room = ServerRoom(
        batch=settings.max_batch_size,
        prefill=settings.max_prefill_token_num,
        held=plan.kv.tokens - _CUT * settings.cache_block_seq_len,
        gate=gate,
        prefix_caching=settings.enable_prefix_caching,
    )
    return torch_cases(
        rule,
        size,
        images=limits.images_per_request,
        request_units=limits.units_per_request or None,
        room=room,
    )


def _sum(terms: Sequence[Term], names: Sequence[str]) -> int:
    return sum(term.bytes for term in terms if term.term in names)


def _rehearsal(document: Mapping[str, Any]) -> Rehearsal:
    cache, death = document["cache"] or {}, document["death"]
    cards = range(len(document["gpus"]))
    return Rehearsal(
        outcome=_OUTCOMES.get(document["outcome"], "failed"),  # type: ignore[arg-type]
        seconds=document["seconds"],
        engine_version=document["versions"].get("lmdeploy", ""),
        cases=tuple(
            RehearsedCase(
                name=case["name"],
                peak=tuple(_phase(document, i, f"case {case['name']}", "peak") for i in cards),
                transient=tuple(_transient(document, i, case["name"]) or 0 for i in cards),
                pinned=0,
            )
            for case in document["cases"]
        ),
        cache=RehearsedCache(
            free=tuple(cache.get("free") or [None for _ in cards]),
            region=tuple(cache.get("bytes") or [None for _ in cards]),
            object_size=next(iter(cache.get("block_bytes") or []), None),
            slab_size=None,
            tokens=cache.get("tokens"),
        ),
        death=None
        if death is None
        else End(
            phase=death["phase"],
            where=" < ".join(death["where"]) or death["message"][:200],
            asked=death["asked"],
            left=death["left"],
        ),
        not_known=tuple(NOT_KNOWN),
    )


def beside(plan: Plan, document: Document, group: int = 0) -> tuple[GpuLedger, ...]:
    """The plan's ledgers with ``rehearsed`` beside ``bytes`` where torch's records tell."""
    place = {index: i for i, index in enumerate(plan.parallel.groups[group])}

    def one(gpu: GpuLedger) -> GpuLedger:
        card = place[gpu.index]
        terms = (replace(t, rehearsed=_seen(document, card, t.term)) for t in gpu.ledger)
        return replace(gpu, ledger=tuple(terms))

    return tuple(one(gpu) if gpu.index in place else gpu for gpu in plan.gpus)


def _seen(document: Mapping[str, Any], card: int, name: str) -> int | None:
    """What torch's allocator said of one term; None where it does not tell it apart."""
    cache = document["cache"] or {}
    if name == "kv_cache":
        sizes = cache.get("bytes") or []
        return int(sizes[card]) if len(sizes) > card else None
    if name == "load_fragmentation":
        sizing = _torch(document, card, "sizing")
        return sizing["reserved"] - sizing["requested"] if sizing else None
    if name == POOL_WARMUP:
        before, after = _torch(document, card, "cache"), _torch(document, card, "ready")
        if not before or not after:
            return None
        # Idle only: what the warm-up left allocated is cuBLAS's and the graphs'.
        return _idle(after) - _idle(before)
    return _transient(document, card, name)


def _transient(document: Mapping[str, Any], card: int, case: str) -> int | None:
    """The most that was live in a case above what the engine holds for good."""
    during, steady = _torch(document, card, f"case {case}"), _steady(document, card)
    if not during or steady is None:
        return None
    return int(during["allocated_peak"] - steady)


def _idle(told: Mapping[str, int]) -> int:
    return told["reserved"] - told["allocated"]


def _steady(document: Mapping[str, Any], card: int) -> int | None:
    """What stays: the first request adds a cuBLAS workspace, which the ledger names by itself.

    The least that a served case left, so that a leak in one case does not count.
    """
    ready = _torch(document, card, "ready")
    if not ready:
        return None
    served = [case["name"] for case in document["cases"] if set(case["statuses"]) == {"finished"}]
    left = [_torch(document, card, f"case {name}") for name in served]
    ends = [one["allocated"] for one in left if one]
    return max(ready["allocated"], min(ends)) if ends else ready["allocated"]


def _torch(document: Mapping[str, Any], card: int, phase: str) -> dict[str, int] | None:
    found = document["gpus"][card]["phases"].get(phase)
    told: dict[str, int] | None = found["torch"] if found else None
    return told


def _phase(document: Mapping[str, Any], card: int, phase: str, name: str) -> int:
    found = document["gpus"][card]["phases"].get(phase)
    return int(found[name]) if found else 0
