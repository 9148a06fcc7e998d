"""The plan for the fallback engine, with its reasons in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.footprint import Footprint
from turbofit.core.messages import groups_of, indices
from turbofit.core.plan import HostMemory, Plan, Settings
from turbofit.core.units import format_bytes
from turbofit.memory.engine import Engine
from turbofit.memory.transformers.placement import device_map
from turbofit.memory.transformers.transformers_account import TransformersAccount
from turbofit.tuner.explain.footprint import footprint_of, footprint_words
from turbofit.tuner.explain.plan_document import PlanDraft, document, host_of, host_problem
from turbofit.tuner.explain.remedies import Remedies
from turbofit.tuner.fallback.messages import verdict, warnings
from turbofit.tuner.fallback.remedies import fallback_remedies
from turbofit.tuner.fallback.search import Chosen, search
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of
from turbofit.tuner.search.constraints import dtype_for
from turbofit.tuner.search.shape import Shape, shape_settings

__all__ = ["make_fallback_plan"]


def make_fallback_plan(request: ResolvedRequest, engine: Engine, reason: str) -> Plan:
    """The best plan on Hugging Face Transformers, without the command lines.

    Args:
        request: ``tp`` is the number of GPUs that one copy's layers are split over (None: the
            fewest that hold one), ``replicas`` the number of copies side by side (None: one).
        engine: Transformers.
        reason: why no engine of LMDeploy is used, as a clause.

    Raises:
        UsageError: something asked for cannot be used with this engine.
    """
    chosen = search(request)
    keeps = chosen.keeps(request)
    settings = _settings(request, chosen)
    accounts = [
        TransformersAccount(
            launch_of(request, settings, copy.gpus, chosen.vision_load), chosen.placement
        )
        for copy in chosen.copies
    ]
    host, kept = _host(request, accounts, engine)
    problem = host_problem(host)
    placed = device_map(chosen.copies[0], chosen.placement, kept)
    ledgers = [ledger for account in accounts for ledger in account.at(0.0).ledgers]
    helps = Remedies((), ()) if keeps else fallback_remedies(request, chosen)
    words = verdict(request, chosen, ledgers, problem, helps.causes)
    footprint: Footprint | UnsetType = UNSET
    if request.least and keeps and problem is None:
        footprint = footprint_of(request, accounts, None)
        words += f", {footprint_words(footprint)}"
    draft = PlanDraft(
        groups=chosen.groups,
        settings=settings,
        vision_load=chosen.vision_load,
        limit=chosen.limit,
        fits=keeps and problem is None,
        verdict=words,
        parallel_reason=_parallel(request, chosen),
        host=host,
        reasons=tuple(_reasons(request, chosen, settings, reason)),
        warnings=tuple(warnings(request, chosen, placed)),
        remedies=helps.remedies,
        held=None if request.promised_requests is None else len(chosen.copies) * chosen.fits,
        device_map=placed,
    )
    return replace(document(request, draft, accounts, engine), footprint=footprint)


def _settings(request: ResolvedRequest, chosen: Chosen) -> Settings:
    """One request at a time, in one forward; each copy's layers are split by the device map."""
    tokens = chosen.session_len
    shape = Shape(
        tp=1, groups=chosen.groups, max_prefill_token_num=tokens, limit=chosen.limit, at_once=1
    )
    return shape_settings(request, shape, tokens, chosen.copies[0].dtype)


def _host(
    request: ResolvedRequest, accounts: Sequence[TransformersAccount], engine: Engine
) -> tuple[HostMemory, int | None]:
    """Host memory of all copies, and what of it one copy's offloaded layers may take.

    Layers that host memory does not hold stay on the disk: only the largest is in memory then.
    """
    host, copies, one = host_of(request, accounts, engine), len(accounts), accounts[0]
    weights = [one.copy.parts.layers[number].weights for number in one.placement.offloaded]
    taken, kept = sum(weights), None
    if host.available is not None:
        taken = max(weights, default=0)
        kept = left = max(0, (host.available - host.pageable) // copies - taken)
        for size in weights:
            left -= size
            taken += size if left >= 0 else 0
    return replace(host, pageable=host.pageable + taken * copies), kept


def _parallel(request: ResolvedRequest, chosen: Chosen) -> str:
    copies, devices = len(chosen.copies), chosen.placement.devices
    split = "one GPU each" if devices == 1 else f"its layers split over {devices} GPUs"
    if request.tp is not None or request.replicas is not None:
        return f"{copies} cop{'y' if copies == 1 else 'ies'}, {split}: as asked"
    if copies > 1:
        return f"{copies} copies, {split}: one for each request at once"
    if not chosen.fits:
        return f"one copy, {split}: the closest to fitting"
    why = "they hold it" if devices == 1 else "fewer do not hold it"
    return f"one copy, {split}: {'it holds it' if devices == 1 else why}"


def _reasons(
    request: ResolvedRequest, chosen: Chosen, settings: Settings, reason: str
) -> Iterator[str]:
    yield f"engine transformers: {reason}"
    yield "max_batch_size 1: this engine answers one request after the other"
    fixed, longest = request.fixed, request.model.text.max_position_embeddings
    if "session_len" in fixed:
        why = "as set by you"
    elif request.workload.context is not None:
        why = "the context asked for"
    elif request.least:
        why = "the workload's request; --context asks for more"
    elif settings.session_len >= longest:
        why = "the model's own context, which fits"
    else:
        why = f"the model's {longest} lowered to what fits"
    yield f"session_len {settings.session_len}: {why}"
    gpus = [gpu for copy in chosen.copies for gpu in copy.gpus]
    why = "as set by you" if fixed.get("dtype") else dtype_for(request.model, gpus)[1]
    yield f"dtype {settings.dtype}: {why}"
    if any(copy.writes_matrix(k) for copy in chosen.copies for k in range(len(copy.gpus))):
        yield (
            "attention is charged with the matrix of all pairs of tokens: torch has no other "
            "kernel for grouped heads on cards before Ampere"
        )
    if chosen.limit is not None and chosen.vision_load.units_per_image:
        yield f"image limit {chosen.limit}: {_limit_words(request, chosen.limit)}"
    parts = chosen.copies[0].parts
    tower = f"vision tower ({format_bytes(parts.vision)}) and " if parts.vision else ""
    yield (
        f"device map on GPU {groups_of(chosen.groups)}: {tower}embeddings"
        f" ({format_bytes(parts.embeddings)}) first; {_cuts(chosen)}; the last norm and lm_head "
        f"{'with the embeddings, whose tensor it is' if parts.tied else 'last'}"
    )


def _limit_words(request: ResolvedRequest, limit: int) -> str:
    """Why images are held to this limit."""
    size, requested = request.workload.image_size, request.requested_limit
    if limit == requested:
        return "the model's own" if request.fixed_limit is None else "as set by you"
    if size is not None:
        return f"what images of {size[0]}x{size[1]} take; larger ones are lowered to it"
    return f"lowered from {requested} to what fits"


def _cuts(chosen: Chosen) -> str:
    placement = chosen.placement
    said = []
    for place in range(placement.devices):
        mine = [n for n, at in enumerate(placement.layers) if at == place]
        if mine:
            said.append(f"layers {indices(mine)} on device {place}")
    if placement.offloaded:
        said.append(f"layers {indices(placement.offloaded)} on none")
    return ", ".join(said)
