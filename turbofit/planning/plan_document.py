"""Makes a `Plan`, the document that users get: verdict, limits, ledgers and footprint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Final

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from turbofit.core.forecast import Throughput, UsualImage
from turbofit.core.machine import Machine
from turbofit.core.messages import counted, indices, plural
from turbofit.core.plan import (
    Candidate,
    EnginePlan,
    Footprint,
    GpuLedger,
    HostMemory,
    Kv,
    LimitCost,
    Plan,
    Remedy,
    Settings,
)
from turbofit.core.promise import Limits, Promise
from turbofit.core.units import MIB, format_bytes
from turbofit.core.version import __version__
from turbofit.memory.account import Account, Engine, VisionLoad
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.speed import counted_tokens, group_class

#: The most bytes of one encoded image, and of a request's body without its images.
_BYTES_PER_IMAGE: Final = 32 * MIB
_BODY_BESIDE_IMAGES: Final = 4 * MIB
_BASE64: Final = 4 / 3


def document(  # noqa: PLR0913 - what a plan says beside its accounts
    request: ResolvedRequest,
    engine: Engine,
    accounts: Sequence[Account],
    *,
    fits: bool,
    verdict: str,
    parallel_reason: str,
    host: HostMemory,
    settings: Settings,
    vision_load: VisionLoad,
    image_limit: int | None,
    requests: Sequence[float] = (),
    throughput: Throughput | None = None,
    considered: Iterable[Candidate] = (),
    reasons: Iterable[str] = (),
    warnings: Iterable[str] = (),
    remedies: Iterable[Remedy] = (),
    limit_costs: Iterable[LimitCost] = (),
    usual_image: UsualImage | UnsetType = UNSET,
    device_map: dict[str, int | str] | None = None,
) -> Plan:
    """Make the plan without command lines.

    ``settings`` are those of the weakest engine; ``image_limit`` is for one image, in tiles or
    pixels. ``requests`` has the number of concurrent requests of each engine; empty: one each.
    """
    footprint: Footprint | UnsetType = UNSET
    if request.least and fits:
        footprint = _footprint(request, accounts, host)
        verdict += f", {_footprint_words(request, footprint)}"
    shares = requests or [1.0] * len(accounts)
    engines = tuple(
        _engine_plan(engine, account, share, device_map)
        for account, share in zip(accounts, shares, strict=True)
    )
    context = request.workload.context or settings.session_len
    communicator = engine.communicator(settings)
    backend = replace(engine.backend, communicator=communicator, reason=parallel_reason)
    promise = make_promise(request, settings, vision_load, image_limit, accounts)
    now = datetime.now(timezone.utc)
    return Plan(
        turbofit_version=__version__,
        created=now.isoformat(timespec="seconds"),
        fits=fits,
        verdict=verdict,
        model=request.model,
        machine=request.machine,
        workload=replace(request.workload, context=context),
        backend=backend,
        promise=promise,
        engines=engines,
        host=host,
        throughput=throughput,
        considered=tuple(considered),
        reasons=tuple(reasons),
        warnings=(*request.model.warnings, *request.machine.warnings, *warnings),
        remedies=tuple(remedies),
        limit_costs=tuple(limit_costs),
        usual_image=usual_image,
        options=request.options,
        footprint=footprint,
    )


def make_promise(
    request: ResolvedRequest,
    settings: Settings,
    vision_load: VisionLoad,
    image_limit: int | None,
    accounts: Sequence[Account],
) -> Promise:
    """Return what clients may count on, whichever engine answers: no more than the peak allows.

    Only this function makes promises. A promise that the request must keep stays as it is; how many
    requests run at once is a figure of the engines.
    """
    rule, images = request.model.image_rule, vision_load.images_per_request
    tokens = [account.tokens_at(account.ratio) for account in accounts]
    requests = requests_held(accounts, vision_load)
    if request.promise is not None:
        return replace(request.promise, requests=requests)
    limits = Limits(
        vision_unit=None,
        max_dynamic_patch=None,
        max_pixels_per_image=None,
        images_per_request=images,
        units_per_image=vision_load.units_per_image,
        units_per_request=vision_load.units_per_request,
        image_tokens_per_request=vision_load.tokens_per_request,
        n=min(account.settings.max_batch_size for account in accounts),
        bytes_per_image=_BYTES_PER_IMAGE if images else 0,
        bytes_per_body=int(images * _BYTES_PER_IMAGE * _BASE64) + _BODY_BESIDE_IMAGES,
    )
    if rule is not None and vision_load.units_per_image:
        limits = replace(limits, vision_unit=rule.unit_name).with_image_limit(rule, image_limit)
    return Promise(
        context=min(settings.session_len, *tokens),
        images=images,
        image_limit=limits.image_limit,
        requests=requests,
        request_tokens=counted_tokens(vision_load, settings.session_len),
        limits=limits,
    )


def _engine_plan(
    engine: Engine, account: Account, requests: float, device_map: dict[str, int | str] | None
) -> EnginePlan:
    ratio, settings = account.ratio, account.settings
    tokens = account.tokens_at(ratio)
    return EnginePlan(
        backend=engine.backend.name,
        gpus=tuple(gpu.index for gpu in account.gpus),
        settings=settings,
        kv=Kv(
            bytes_per_token=account.bytes_per_token,
            tokens=tokens,
            region_bytes=account.region_at(ratio),
            longest_request_tokens=min(settings.session_len, tokens),
        ),
        units_per_forward=account.units_per_forward,
        requests=round(requests, 3),
        ledgers=account.ledgers_at(ratio),
        device_map=device_map,
    )


def found_words(
    request: ResolvedRequest,
    groups: Sequence[Sequence[int]],
    accounts: Sequence[Account],
    vision_load: VisionLoad,
    usual: UsualImage | UnsetType = UNSET,
) -> str:
    """Describe a plan that fits: its GPUs, its requests at once, and the memory that stays free.

    ``vision_load`` has the images of one request, and ``usual`` the forecast for images of a usual
    size.
    """
    ledgers = [ledger for account in accounts for ledger in account.ledgers_at(account.ratio)]
    running = sum(account.settings.max_batch_size for account in accounts)
    count = requests_held(accounts, vision_load)
    texts = requests_held(accounts, replace(vision_load, tokens_per_request=0))
    running_words = _at_once_words(count, texts, vision_load, usual)
    if "max_batch_size" in request.engine_options and running > count:
        running_words += f", as the cache holds no more of a batch of {running:,}"
    where = " and ".join(group_words(request, group) for group in groups)
    if all(len(group) == 1 for group in groups):
        where = f"GPU {indices(group[0] for group in groups)}"
    free = free_words(request, ledgers, groups)
    return f"on {where}: {running_words}; {free}"


def _at_once_words(
    count: int, texts: int, vision_load: VisionLoad, usual: UsualImage | UnsetType
) -> str:
    """Say how many requests run at once: ``count`` of the largest, and more of smaller ones.

    ``texts`` is the number of requests without images that run at once.
    """
    if usual and usual.requests_at_once > count:
        size, smaller = "{}x{}".format(*usual.image_size), usual.requests_at_once
        return f"{counted(smaller, 'request')} at once of {size}, {count:,} of the largest"
    words = f"{counted(count, 'request')} at once"
    return f"{words}, {texts:,} of text" if vision_load.units_per_image and texts > count else words


def free_words(
    request: ResolvedRequest, ledgers: Sequence[GpuLedger], groups: Sequence[Sequence[int]]
) -> str:
    """Return the memory that stays free on the tightest GPU, as a clause of a verdict."""
    tightest = min(ledgers, key=lambda ledger: ledger.headroom - ledger.beyond_budget)
    spare, of = tightest.headroom - tightest.beyond_budget, ""
    if request.budget:
        of = " of the budget" if tightest.beyond_budget else " of the card"
    each = " on each" if sum(map(len, groups)) > 1 else ""
    return f"{format_bytes(spare)}{of} stay free{each}"


def idle_words(request: ResolvedRequest, groups: Sequence[Sequence[int]]) -> str:
    """Return the GPUs without an engine, in words; empty if the least memory was wished."""
    used = {index for group in groups for index in group}
    idle = [f"GPU {gpu.index} ({gpu.name})" for gpu in request.visible if gpu.index not in used]
    return f"not used: {', '.join(idle)}" if idle and not request.least else ""


def cache_words(accounts: Sequence[Account], vision_load: VisionLoad) -> str:
    """Say how many requests the caches of engines with equal settings hold.

    A request is in one cache, never divided over several.
    """
    settings, context = accounts[0].settings, accounts[0].settings.session_len
    tokens = [account.tokens_at(account.ratio) for account in accounts]
    size = counted_tokens(vision_load, context)
    requests, longest = (
        sum(settings.requests_in(cache, length) for cache in tokens) for length in (size, context)
    )
    whole = "" if size == context else f" or {longest:,} of {context:,}"
    return (
        f"the cache holds {sum(tokens):,} KV tokens, {counted(requests, 'request')} of"
        f" {size:,} tokens{whole}"
    )


def requests_held(accounts: Sequence[Account], vision_load: VisionLoad) -> int:
    """Return how many requests all engines run at once, each with all its tokens in a cache."""
    sizes = [counted_tokens(vision_load, account.settings.session_len) for account in accounts]
    return sum(
        min(it.settings.max_batch_size, it.settings.requests_in(it.tokens_at(it.ratio), size))
        for it, size in zip(accounts, sizes, strict=True)
    )


def on_machine(plan: Plan, machine: Machine) -> Plan:
    """Return the plan with a machine that is equal for planning, and with its GPU ids."""
    engines = []
    for engine in plan.engines:
        ledgers = (replace(it, uuid=machine.gpu(it.index).uuid) for it in engine.ledgers)
        engines.append(replace(engine, ledgers=tuple(ledgers)))
    return replace(plan, machine=machine, engines=tuple(engines))


def group_words(request: ResolvedRequest, group: Sequence[int]) -> str:
    """Return a group's GPUs in words: ``GPU 0+2 (NVLink)``."""
    gpus = [request.machine.gpu(index) for index in group]
    names = "+".join(str(index) for index in group)
    link = f" ({group_class(request.machine, gpus).words})" if len(gpus) > 1 else ""
    return f"GPU {names}{link}"


def _footprint(
    request: ResolvedRequest, accounts: Sequence[Account], host: HostMemory
) -> Footprint:
    """Return the bytes that engines take of each GPU, the bytes left, and how many engines fit."""
    taken: dict[int, int] = {}
    left: list[int] = []
    servers = 0
    for account in accounts:
        ratio, more = account.ratio, []
        cards = zip(account.gpus, account.taken_at(ratio), account.ledgers_at(ratio), strict=True)
        for gpu, size, ledger in cards:
            taken[gpu.index] = size
            # A budget raises the margin of this server alone. Further servers on the card need the
            # margin that was asked for, and no more.
            margin = min(ledger.margin, request.margin.of(gpu))
            left.append(ledger.headroom - margin)
            more.append(left[-1] // (ledger.peak - ledger.used))  # divided by one engine's bytes
        servers += 1 + min(more)
    need = host.total / len(accounts)
    if host.available is not None and need:
        servers = min(servers, int(host.available / need))
    sizes = tuple(taken[index] for index in sorted(taken))
    return Footprint(taken=sizes, left=min(left), servers=servers)


def _footprint_words(request: ResolvedRequest, footprint: Footprint) -> str:
    count, left = footprint.servers, format_bytes(footprint.left)
    where = "the GPU holds" if len(footprint.taken) == 1 else "the GPUs hold"
    engines = f"{where} {count:,} such {plural(count, 'engine')} in all"
    of = "of the card" if request.budget else "of it"
    return f"{left} {of} beyond the margin, for others; {engines}"
