"""An evaluated shape as the contract's document: verdict, limits, ledgers, reasons."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.messages import on_each_gpu, plural
from turbofit.core.plan import (
    Candidate,
    GpuLedger,
    GroupPlan,
    Held,
    HostMemory,
    Kv,
    LimitCost,
    Limits,
    Parallel,
    Plan,
    Remedy,
    Settings,
    Throughput,
)
from turbofit.core.struct import Struct
from turbofit.core.units import MIB, format_bytes
from turbofit.core.version import __version__
from turbofit.memory.account import Account, GroupOutcome
from turbofit.memory.engine import Engine
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of
from turbofit.tuner.speed.links import group_class
from turbofit.tuner.speed.throughput import counted_tokens

__all__ = [
    "PlanDraft", "accounts_of", "cache_words", "document", "host_of", "host_problem", "host_short",
    "requests_held", "verdict_of",
]  # fmt: skip

#: Encoded bytes that one image and one request body may have.
_BYTES_PER_IMAGE = 32 * MIB
_BODY_BESIDE_IMAGES = 4 * MIB
_BASE64 = 4 / 3


class PlanDraft(Struct):
    """What a document is made of besides the accounts.

    ``host`` is of all groups. ``at_once`` are the requests that are counted on in each group where
    cards are unequal, empty where all groups run ``settings``. ``held`` are requests at once that
    all groups hold, None where nobody asked for a number. ``device_map`` is where an engine that
    splits a model by its layers has each of them.
    """

    groups: tuple[tuple[int, ...], ...]
    settings: Settings
    vision_load: VisionLoad
    limit: int | None
    fits: bool
    verdict: str
    parallel_reason: str
    host: HostMemory
    throughput: Throughput | None = None
    considered: tuple[Candidate, ...] = ()
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    at_once: tuple[float, ...] = ()
    held: int | None = None
    limit_costs: tuple[LimitCost, ...] = ()
    device_map: dict[str, int | str] | None = None


def accounts_of(
    resolved: ResolvedRequest,
    settings: Sequence[Settings],
    groups: Sequence[Sequence[int]],
    vision_load: VisionLoad,
    engine: Engine,
    free_at_cache: int | None = None,
) -> tuple[Account, ...]:
    """One account a group, each of its own settings."""
    return tuple(
        engine.account(
            launch_of(
                resolved,
                each,
                [resolved.machine.gpu(index) for index in group],
                vision_load,
                free_at_cache,
            )
        )
        for each, group in zip(settings, groups, strict=True)
    )


def document(
    resolved: ResolvedRequest, parts: PlanDraft, accounts: Sequence[Account], engine: Engine
) -> Plan:
    """The whole plan, without the command lines."""
    settings = parts.settings
    outcomes = [account.at(account.settings.cache_max_entry_count) for account in accounts]
    ledgers: list[GpuLedger] = [one for outcome in outcomes for one in outcome.ledgers]
    total = sum(outcome.tokens for outcome in outcomes)
    each = [
        _kv(account, outcome, total) for account, outcome in zip(accounts, outcomes, strict=True)
    ]
    least = min(each, key=lambda kv: kv.tokens)
    units_per_forward = max(account.units_per_forward for account in accounts)
    return Plan(
        turbofit_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        fits=parts.fits,
        verdict=parts.verdict,
        model=resolved.model,
        machine=resolved.machine,
        workload=replace(
            resolved.workload, context=resolved.workload.context or settings.session_len
        ),
        engine=engine.planned,
        parallel=Parallel(
            tp=max(account.settings.tp for account in accounts),
            replicas=len(parts.groups),
            groups=parts.groups,
            communicator=engine.communicator(settings),
            reason=parts.parallel_reason,
        ),
        settings=settings,
        limits=replace(
            _limits_of(resolved, parts, units_per_forward),
            n=min(account.settings.max_batch_size for account in accounts),
        ),
        kv=least
        if parts.at_once
        else replace(least, region_bytes=min(k.region_bytes for k in each)),
        gpus=tuple(sorted(ledgers, key=lambda ledger: ledger.index)),
        host=parts.host,
        throughput=parts.throughput,
        considered=parts.considered,
        reasons=parts.reasons,
        warnings=(*resolved.model.warnings, *resolved.machine.warnings, *parts.warnings),
        remedies=parts.remedies,
        limit_costs=parts.limit_costs,
        by_group=tuple(
            GroupPlan(
                settings=account.settings,
                kv=kv,
                units_per_forward=account.units_per_forward,
                at_once=round(at_once, 3),
            )
            for account, kv, at_once in zip(accounts, each, parts.at_once, strict=False)
        ),
        device_map=parts.device_map,
        held=_held(parts),
        options=resolved.options,
    )


def _held(parts: PlanDraft) -> Held | UnsetType:
    """The requests at once that are held, where a person says how many there must be."""
    if parts.held is None:
        return UNSET
    size = counted_tokens(parts.vision_load, parts.settings.session_len)
    return Held(requests=parts.held, request_tokens=size)


def _kv(account: Account, outcome: GroupOutcome, total: int) -> Kv:
    """The cache of one group."""
    return Kv(
        bytes_per_token=account.bytes_per_token,
        tokens=outcome.tokens,
        total_tokens=total,
        region_bytes=outcome.region,
        longest_request_tokens=min(account.settings.session_len, outcome.tokens),
    )


def _limits_of(resolved: ResolvedRequest, parts: PlanDraft, units_per_forward: int) -> Limits:
    """What the gateway holds requests to."""
    rule, vision_load, limit = resolved.model.image_rule, parts.vision_load, parts.limit
    images = vision_load.images_per_request
    vision = rule if vision_load.units_per_image else None
    limits = Limits(
        vision_unit=None,
        max_dynamic_patch=None,
        max_pixels_per_image=None,
        images_per_request=images,
        units_per_image=vision_load.units_per_image,
        units_per_request=vision_load.units_per_request,
        units_per_forward=units_per_forward,
        image_tokens_per_request=vision_load.tokens_per_request,
        n=parts.settings.max_batch_size,
        bytes_per_image=_BYTES_PER_IMAGE if images else 0,
        bytes_per_body=int(images * _BYTES_PER_IMAGE * _BASE64) + _BODY_BESIDE_IMAGES,
    )
    if vision is None:
        return limits
    return replace(limits, vision_unit=vision.unit_name, **{vision.plan_limit_name: limit})


def host_of(resolved: ResolvedRequest, accounts: Sequence[Account], engine: Engine) -> HostMemory:
    """Host memory of all groups beside what the machine has."""
    available = resolved.machine.host.ram_available
    each = [
        engine.host_memory(
            resolved.model, account.settings, units_per_forward=account.units_per_forward
        )
        for account in accounts
    ]
    return HostMemory(
        pinned=sum(one.pinned for one in each),
        pageable=sum(one.pageable for one in each),
        available=None if available == "NA" else available,
    )


def host_short(host: HostMemory) -> int:
    """Bytes of host memory that are missing; 0 where nobody knows."""
    return 0 if host.available is None else max(0, host.pinned + host.pageable - host.available)


def host_problem(host: HostMemory) -> str | None:
    """Why host memory does not do, where it is known not to."""
    short = host_short(host)
    if host.available is None or not short:
        return None
    return (
        f"host RAM is {format_bytes(short)} short: {format_bytes(host.pinned)}"
        f" pinned and {format_bytes(host.pageable)} pageable of {format_bytes(host.available)}"
    )


def verdict_of(
    resolved: ResolvedRequest,
    groups: Sequence[Sequence[int]],
    accounts: Sequence[Account],
    tokens: Sequence[int],
    vision_load: VisionLoad,
) -> str:
    """The words of a plan that fits: what runs at once, and what the cache holds.

    Args:
        resolved: for the model and the cards.
        groups: of all engines.
        accounts: of all engines, or of one where they are alike.
        tokens: what each engine's cache holds.
        vision_load: of the request that is counted.
    """
    outcomes = [one.at(one.settings.cache_max_entry_count) for one in accounts]
    spare = min(ledger.headroom for outcome in outcomes for ledger in outcome.ledgers)
    batches = [one.settings.max_batch_size for one in accounts]
    running = sum(batches) if len(accounts) == len(groups) else batches[0] * len(groups)
    context = accounts[0].settings.session_len
    size = counted_tokens(vision_load, context)
    running_words = f"{running:,} {plural(running, 'request')} at once"
    if running > sum(one // size for one in tokens):  # a batch that was given
        running_words = f"a batch of {running:,}"
    where = " and ".join(group_words(resolved, group) for group in groups)
    each = on_each_gpu(sum(map(len, groups)))
    return (
        f"fits: {resolved.model.name} on {where}: {running_words};"
        f" {cache_words(tokens, vision_load, context)}; {format_bytes(spare)} stay free{each}"
    )


def cache_words(tokens: Sequence[int], vision_load: VisionLoad, context: int) -> str:
    """What caches of so many tokens hold together; no request lies in two of them."""
    request = counted_tokens(vision_load, context)
    held, longest = (sum(one // each for one in tokens) for each in (request, context))
    whole = "" if request == context else f" or {longest:,} of {context:,}"
    return (
        f"the cache holds {sum(tokens):,} KV tokens, {held:,} {plural(held, 'request')} of"
        f" {request:,} tokens{whole}"
    )


def requests_held(
    accounts: Sequence[Account], tokens: Sequence[int], vision_load: VisionLoad
) -> int:
    """Requests that all engines run at once with all their tokens in the caches.

    Args:
        accounts: of all engines.
        tokens: what each engine's cache holds.
        vision_load: of the request that is counted.
    """
    return sum(
        min(settings.max_batch_size, held // counted_tokens(vision_load, settings.session_len))
        for settings, held in zip((one.settings for one in accounts), tokens, strict=True)
    )


def group_words(resolved: ResolvedRequest, group: Sequence[int]) -> str:
    """A group as people say it: ``GPU 0+2 (NVLink)``."""
    gpus: list[Gpu] = [resolved.machine.gpu(index) for index in group]
    names = "+".join(str(index) for index in group)
    return (
        f"GPU {names} ({group_class(resolved.machine, gpus).words})"
        if len(gpus) > 1
        else f"GPU {names}"
    )
