"""The plan for the fallback engine, with its reasons in words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.plan import Engine, HostMemory, Kv, Parallel, Plan, Settings
from turbofit.core.units import format_bytes
from turbofit.core.version import __version__
from turbofit.core.words import groups_of, indices
from turbofit.memory.transformers.components import components
from turbofit.memory.transformers.ledgers import HOST_PROCESS
from turbofit.tuner.explain.plan_document import PlanDraft, host_problem, limits_of
from turbofit.tuner.fallback.cut import device_map
from turbofit.tuner.fallback.remedies import fallback_remedies
from turbofit.tuner.fallback.search import Chosen, search
from turbofit.tuner.fallback.words import verdict, warnings
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.constraints import dtype_for

__all__ = ["TRANSFORMERS", "make_fallback_plan"]

#: The release that the account was laid beside; any 5.x is launched that has the same inside.
TRANSFORMERS = "5.17"


def make_fallback_plan(request: ResolvedRequest, reason: str) -> Plan:
    """The best plan on Hugging Face Transformers, without the command lines.

    Args:
        request: ``tp`` is the number of GPUs that one copy's layers are split over (None: the
            fewest that hold one), ``replicas`` the number of copies side by side (None: one).
        reason: why no engine of LMDeploy is used, as a clause.

    Raises:
        UsageError: something asked for cannot be used with this engine.
    """
    _refuse(request)
    chosen = search(request)
    settings = _settings(chosen)
    host, kept = _host(request, chosen)
    problem = host_problem(host)
    parts = PlanDraft(
        groups=tuple(tuple(gpu.index for gpu in one.gpus) for one in chosen.accounts),
        settings=settings,
        vision_load=chosen.vision_load,
        limit=chosen.limit,
        fits=chosen.fits and problem is None,
        verdict=verdict(request, chosen, problem),
        parallel_reason=_parallel(request, chosen),
    )
    ledgers = [
        account.ledger(place, chosen.placement, chosen.load)
        for account in chosen.accounts
        for place in range(len(account.gpus))
    ]
    layers = chosen.accounts[0].parts.layers
    region = sum(layer.kv(chosen.session_len, chosen.load.images) for layer in layers)
    placed = device_map(chosen.accounts[0], chosen.placement, kept)
    workload = request.workload
    return Plan(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        fits=parts.fits,
        verdict=parts.verdict,
        model=request.model,
        machine=request.machine,
        workload=replace(workload, context=workload.context or settings.session_len),
        engine=Engine(name="transformers", version=TRANSFORMERS),
        parallel=Parallel(
            tp=1,
            replicas=len(parts.groups),
            groups=parts.groups,
            communicator="none",
            reason=parts.parallel_reason,
        ),
        settings=settings,
        limits=limits_of(request, parts, chosen.load.units),
        kv=Kv(
            bytes_per_token=sum(layer.kv_per_token for layer in layers),
            tokens=settings.session_len,
            total_tokens=settings.session_len * len(parts.groups),
            region_bytes=region,
            longest_request_tokens=settings.session_len,
        ),
        gpus=tuple(sorted(ledgers, key=lambda ledger: ledger.index)),
        host=host,
        reasons=tuple(_reasons(request, chosen, settings, reason)),
        warnings=(
            *request.model.warnings,
            *request.machine.warnings,
            *warnings(request, chosen, placed),
        ),
        remedies=() if chosen.fits else fallback_remedies(request),
        device_map=placed,
    )


def _refuse(request: ResolvedRequest) -> None:
    """Options of LMDeploy that mean nothing here.

    Raises:
        UsageError: one of them was given.
    """
    meant = {"dtype", "session_len", "max_batch_size", "tp"}
    for name in sorted(set(request.fixed) - meant):
        raise UsageError(
            f"--{name.replace('_', '-')} is LMDeploy's, and the fallback engine has no such option",
            hint="leave it out; --dtype and --session-len are heard",
        )
    if request.fixed.get("max_batch_size", 1) != 1:
        raise UsageError(
            "the fallback engine serves one request at a time: --max-batch-size is 1",
            hint="--replicas N serves N at a time, each on GPUs of its own",
        )


def _settings(chosen: Chosen) -> Settings:
    asked = {
        "tp": 1,
        "dtype": chosen.accounts[0].dtype,
        "max_batch_size": 1,
        "session_len": chosen.session_len,
        "max_prefill_token_num": chosen.session_len,
    }
    try:
        return msgspec.convert(asked, Settings)
    except msgspec.ValidationError as exc:
        raise UsageError(
            f"an engine option cannot be used: {exc}", hint="--dtype float16 or bfloat16"
        ) from None


def _host(request: ResolvedRequest, chosen: Chosen) -> tuple[HostMemory, int | None]:
    """Host memory of all copies, and what of it one copy's offloaded layers may take.

    Layers that host memory does not hold stay on the disk: only the largest is in memory then.
    """
    available = request.machine.host.ram_available
    copies = len(chosen.accounts)
    weights = [chosen.accounts[0].parts.layers[n].weights for n in chosen.placement.offloaded]
    if available == "NA":
        taken, kept = sum(weights), None
    else:
        kept = max(0, available // copies - HOST_PROCESS - max(weights, default=0))
        taken, left = max(weights, default=0), kept
        for size in weights:
            left -= size
            taken += size if left >= 0 else 0
    host = HostMemory(
        pinned=0,
        pageable=(HOST_PROCESS + taken) * copies,
        available=None if available == "NA" else available,
    )
    return host, kept


def _parallel(request: ResolvedRequest, chosen: Chosen) -> str:
    copies, devices = len(chosen.accounts), chosen.placement.devices
    split = "one GPU each" if devices == 1 else f"its layers split over {devices} GPUs"
    if request.tp is not None or request.replicas is not None:
        return f"{copies} cop{'y' if copies == 1 else 'ies'}, {split}: as asked"
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
    elif settings.session_len >= longest:
        why = "the model's own context, which fits"
    else:
        why = f"the model's {longest} lowered to what fits"
    yield f"session_len {settings.session_len}: {why}"
    gpus = chosen.accounts[0].gpus
    why = "as set by you" if fixed.get("dtype") else dtype_for(request.model, gpus)[1]
    yield f"dtype {settings.dtype}: {why}"
    if any(chosen.accounts[0].writes_matrix(place) for place in range(len(gpus))):
        yield (
            "attention is charged with the matrix of all pairs of tokens: torch has no other "
            "kernel for grouped heads on cards before Ampere"
        )
    if chosen.limit is not None and chosen.vision_load.units_per_image:
        own = request.own_limit
        said = "the model's own" if chosen.limit == own else f"lowered from {own} to what fits"
        if request.fixed_limit is not None:
            said = "as set by you"
        yield f"image limit {chosen.limit}: {said}"
    parts = components(request.model, settings.dtype)
    groups = groups_of(tuple(g.index for g in one.gpus) for one in chosen.accounts)
    yield (
        f"device map on GPU {groups}: vision tower ({format_bytes(parts.vision)}) and embeddings "
        f"({format_bytes(parts.embeddings)}) first; {_cuts(chosen)}; the last norm and lm_head "
        f"{'with the embeddings, whose tensor it is' if parts.tied else 'last'}"
    )


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
