"""Plans the fallback engine: number of GPUs, image limit, context, and the plan's words.

A copy answers one request after the other: each of several requests at once needs its own copy, if
the GPUs hold so many. The checkpoint's own image limit on the fewest GPUs is preferred, then lower
limits; decoder layers are taken off the GPUs only if no other plan serves a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError, UsageError
from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.messages import BEYOND, groups_of, indices
from turbofit.core.plan import GpuLedger, HostMemory, Remedy, Settings
from turbofit.core.struct import known
from turbofit.core.units import bisect, format_bytes
from turbofit.memory.account import Account, Engine, VisionLoad
from turbofit.memory.placement import (
    LayeredCopy,
    LayeredEngine,
    Placement,
    fewest_offloaded,
    holds,
    load_of,
    nowhere,
    place_all,
)
from turbofit.tuner.explain.plan_document import (
    document,
    free_words,
    idle_words,
)
from turbofit.tuner.explain.reasons import context_reason
from turbofit.tuner.explain.remedies import (
    MORE_GPUS,
    Change,
    Remedies,
    fewer_at_once,
    left_to_turbofit,
    smaller_workload,
    smallest_cards,
    stopped,
    with_more_gpus,
)
from turbofit.tuner.resolved_request import (
    ResolvedRequest,
    host_of,
    host_problem,
    launch_of,
    vision_load_of,
)
from turbofit.tuner.search.candidates import too_long
from turbofit.tuner.search.shapes import (
    Shape,
    chosen_dtype,
    dtype_for,
    shape_settings,
    split_over_slices,
)
from turbofit.tuner.search.sizing import (
    CONTEXT_STEP,
    ROUND_CONTEXT,
    excess_tokens,
    most_context,
    shortest_context,
)
from turbofit.tuner.verdict import Planned, Verdict, fitting

#: How often pixels are halved before decoder layers are taken off the GPUs instead.
_HALVES = 4


class Chosen(NamedTuple):
    """The copies, their placements and their promise; ``fits`` is False for the closest misfit."""

    copies: Sequence[LayeredCopy]
    placement: Placement
    vision_load: VisionLoad
    image_limit: int | None
    session_len: int
    fits: bool = True

    def keeps(self, request: ResolvedRequest) -> bool:
        """Whether it fits, with one copy for each request that must run at once."""
        return self.fits and len(self.copies) >= (request.promised_requests or 1)

    def held(self, request: ResolvedRequest) -> int | None:
        """The requests that run at once, one on each copy; None if no number was promised."""
        return None if request.promised_requests is None else len(self.copies) * self.fits

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(gpu.index for gpu in copy.gpus) for copy in self.copies)


def search(request: ResolvedRequest, engine: LayeredEngine) -> Chosen:
    _check(request)
    most = min(request.promised_requests or 1, len(request.visible) // (request.tp or 1))
    for copies in range(most, 1, -1) if request.replicas is None else ():
        chosen = _search(replace(request, replicas=copies), engine)
        if chosen.fits:
            return chosen
    return _search(request, engine)


def _search(request: ResolvedRequest, engine: LayeredEngine) -> Chosen:
    request = _held(request)
    every = [
        (image_limit, vision_load_of(request, image_limit)) for image_limit in _limits(request)
    ]
    possible = [pair for pair in every if not excess_tokens(request, pair[1])]
    groupings = list(_groupings(request, engine))
    for pair, copies in product(possible, groupings):
        chosen = _on_gpus(request, engine, copies, *pair)
        if chosen is not None:
            return chosen
    copies = groupings[-1]
    for (
        image_limit,
        load,
    ) in possible:  # the shortest context, so that as few layers as possible are off the GPUs
        tokens = _shortest(request, load)
        placement = fewest_offloaded(engine.tightest(copies), load_of(load, tokens))
        if placement is not None:
            return Chosen(copies, placement, load, image_limit, tokens)
    # All layers off the GPUs, so that the rest shows what is too large.
    image_limit, load = every[-1]
    return Chosen(
        copies, nowhere(copies[0]), load, image_limit, _shortest(request, load), fits=False
    )


def _check(request: ResolvedRequest) -> None:
    if not request.visible:
        raise UsageError("there is no GPU to plan for", hint="see turbofit machine")
    wanted = (request.tp or 1) * (request.replicas or 1)
    if wanted > len(request.visible):
        raise UsageError(
            f"{wanted} GPUs are asked for, {len(request.visible)} may be used",
            hint="lower --tp (GPUs that one copy is split over) or --replicas",
        )
    whole = [gpu for gpu in request.visible if not gpu.mig]
    if request.tp is not None and request.tp > 1 and wanted > len(whole):
        raise UsageError(split_over_slices(request.tp, len(whole)), hint="leave --tp out")


def _held(request: ResolvedRequest) -> ResolvedRequest:
    """Convert a given image size to an image limit, which is not lowered.

    The limit in the model folder lowers larger images, so the plan counts the worst under it.
    """
    rule, requested = request.model.image_rule, request.requested_image_limit
    if rule is None or request.workload.image_size is None or requested is None:
        return request
    promised = vision_load_of(request, requested).units_per_image
    whole = request.with_workload(image_size=None)
    image_limit = rule.largest_limit(promised) if rule.varies_by_limit and promised else None
    return whole if image_limit is None else replace(whole, image_limit=min(image_limit, requested))


def _limits(request: ResolvedRequest) -> Sequence[int | None]:
    """Image limits worth trying, the largest first; a limit that the user gave is the only one."""
    rule, requested = request.model.image_rule, request.requested_image_limit
    if rule is None or requested is None or vision_load_of(request, requested).units_per_image == 0:
        return [None]
    if request.image_limit is not None or not rule.varies_by_limit:
        return [requested]
    limits = sorted({*rule.lower_limits(_HALVES), *_within_context(request, rule, requested)})
    by_units = {
        vision_load_of(request, image_limit).units_per_image: image_limit for image_limit in limits
    }
    return sorted(by_units.values(), reverse=True)


def _within_context(request: ResolvedRequest, rule: ImageRule, requested: int) -> tuple[int, ...]:
    """The largest image limit for a short context, and its halves; empty for a long context."""
    vision_load = vision_load_of(request, requested)
    excess = excess_tokens(request, vision_load)
    if not excess:
        return ()
    tokens = max(0, vision_load.tokens_per_request - excess) // vision_load.images_per_request
    image_limit = rule.largest_limit(rule.units_within(tokens))
    return () if image_limit is None else rule.with_limit(image_limit).lower_limits(_HALVES)


def _groupings(request: ResolvedRequest, engine: LayeredEngine) -> Iterator[list[LayeredCopy]]:
    """Yield copies on groups of equal size, the fewest GPUs first, with the freest cards first.

    Each of several copies spans several GPUs only if both numbers are given.
    """

    def taken(gpu: Gpu) -> int:
        return known(gpu.used, 0) + request.margin_of(gpu) - gpu.usable

    freest = sorted(request.visible, key=lambda gpu: (taken(gpu), gpu.index))
    replicas = request.replicas or 1
    most = 1 if replicas > 1 else len(freest)
    sizes = range(1, most + 1) if request.tp is None else (request.tp,)
    for size in sizes:
        cards = freest if size == 1 else [gpu for gpu in freest if not gpu.mig]
        if len(cards) < size * replicas:
            return
        chosen = cards[: size * replicas]
        dtype = chosen_dtype(request.model, request.engine_options.get("dtype"), chosen)
        groups = [chosen[number::replicas] for number in range(replicas)]
        yield [
            engine.copy(request.model, dtype, group, [request.margin_of(gpu) for gpu in group])
            for group in groups
        ]


def _shortest(request: ResolvedRequest, vision_load: VisionLoad) -> int:
    most = most_context(request)
    return most if request.context_given else min(shortest_context(vision_load), most)


def _on_gpus(
    request: ResolvedRequest,
    engine: LayeredEngine,
    copies: list[LayeredCopy],
    image_limit: int | None,
    vision_load: VisionLoad,
) -> Chosen | None:
    """The copies with the longest context that all can hold; None if they hold none."""
    tightest = engine.tightest(copies)

    def fits(tokens: int) -> bool:
        return holds(tightest, load_of(vision_load, tokens))

    shortest = tokens = _shortest(request, vision_load)
    if not fits(shortest):
        return None
    if not request.context_given and not request.least:
        longest = request.model.text.max_position_embeddings
        tokens = longest if fits(longest) else bisect(fits, shortest, longest, CONTEXT_STEP)[0]
        if tokens < longest:
            rounded = tokens // ROUND_CONTEXT * ROUND_CONTEXT
            exact = max(shortest, tokens // CONTEXT_STEP * CONTEXT_STEP)
            tokens = rounded if rounded >= shortest else exact
    placement = place_all(tightest, load_of(vision_load, tokens))
    assert placement is not None
    return Chosen(copies, placement, vision_load, image_limit, tokens)


def plan_fallback(request: ResolvedRequest, engine: Engine, reason: str) -> Planned:
    """The best plan on Hugging Face Transformers; command lines are not made.

    ``tp`` of the request is the number of GPUs for one copy's layers (None: the fewest that hold
    one), ``replicas`` the number of copies (None: one). ``reason`` is a clause that says why no
    engine of LMDeploy is used.

    Raises:
        UsageError: a part of the request cannot be used with this engine.
    """
    assert isinstance(engine, LayeredEngine)
    chosen = search(request, engine)
    settings = _settings(request, chosen)
    accounts = [
        engine.placed(launch_of(request, settings, copy.gpus, chosen.vision_load), chosen.placement)
        for copy in chosen.copies
    ]
    host, kept = _host(request, chosen, accounts, engine)
    placed = chosen.copies[0].device_map(chosen.placement, kept)
    helps = Remedies() if chosen.keeps(request) else _remedies(request, engine, chosen)
    verdict = _verdict(request, chosen, accounts, host, helps.causes)
    plan = document(
        request,
        engine,
        accounts,
        fits=verdict.fits,
        verdict=verdict.text,
        parallel_reason=_parallel(request, chosen),
        host=host,
        settings=settings,
        vision_load=chosen.vision_load,
        image_limit=chosen.image_limit,
        held_requests=chosen.held(request),
        reasons=tuple(_reasons(request, chosen, settings, reason)),
        warnings=_warnings(request, chosen, placed),
        remedies=helps.remedies,
        device_map=placed,
    )
    return Planned(plan=plan, verdict=verdict)


def _settings(request: ResolvedRequest, chosen: Chosen) -> Settings:
    """The settings of one copy: one request at a time, in one forward."""
    shape = Shape(
        tp=1,
        groups=chosen.groups,
        max_prefill_token_num=chosen.session_len,
        image_limit=chosen.image_limit,
        dtype=chosen.copies[0].dtype,
        at_once=1,
    )
    return shape_settings(request, shape, chosen.session_len)


def _host(
    request: ResolvedRequest, chosen: Chosen, accounts: Sequence[Account], engine: Engine
) -> tuple[HostMemory, int | None]:
    """Host memory of all copies, and the part of it for one copy's offloaded layers.

    Layers that do not fit into host memory stay on disk, and only the largest is in memory.
    """
    host, copies = host_of(request, accounts, engine), len(accounts)
    layers = chosen.copies[0].parts.layers
    weights = [layers[number].weights for number in chosen.placement.offloaded]
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
    return f"one copy, {split}: {'it holds it' if devices == 1 else 'fewer do not hold it'}"


def _reasons(
    request: ResolvedRequest, chosen: Chosen, settings: Settings, reason: str
) -> Iterator[str]:
    yield f"engine transformers: {reason}"
    yield "max_batch_size 1: this engine answers one request after the other"
    context = settings.session_len
    yield f"session_len {context}: {context_reason(request, context, 'fits')}"
    gpus = [gpu for copy in chosen.copies for gpu in copy.gpus]
    why = (
        "as set by you"
        if request.engine_options.get("dtype")
        else dtype_for(request.model, gpus)[1]
    )
    yield f"dtype {settings.dtype}: {why}"
    if any(copy.writes_matrix(k) for copy in chosen.copies for k in range(len(copy.gpus))):
        yield (
            "attention is charged with the matrix of all pairs of tokens: torch has no other "
            "kernel for grouped heads on cards before Ampere"
        )
    if chosen.image_limit is not None and chosen.vision_load.units_per_image:
        yield f"image limit {chosen.image_limit}: {_why_limit(request, chosen.image_limit)}"
    yield _device_map_words(chosen)


def _why_limit(request: ResolvedRequest, image_limit: int) -> str:
    size, requested = request.workload.image_size, request.requested_image_limit
    if image_limit == requested:
        return "the model's own" if request.image_limit is None else "as set by you"
    if size is not None:
        return f"what images of {size[0]}x{size[1]} take; larger ones are lowered to it"
    return f"lowered from {requested} to what fits"


def _device_map_words(chosen: Chosen) -> str:
    """The devices of each part of one copy, in words."""
    parts, placement = chosen.copies[0].parts, chosen.placement
    cuts = [
        f"layers {indices(mine)} on device {place}"
        for place in range(placement.devices)
        if (mine := [number for number, at in enumerate(placement.layers) if at == place])
    ]
    cuts += [f"layers {indices(placement.offloaded)} on none"] if placement.offloaded else []
    tower = f"vision tower ({format_bytes(parts.vision)}) and " if parts.vision else ""
    return (
        f"device map on GPU {groups_of(chosen.groups)}: {tower}embeddings"
        f" ({format_bytes(parts.embeddings)}) first; {', '.join(cuts)}; the last norm and lm_head "
        f"{'with the embeddings, whose tensor it is' if parts.tied else 'last'}"
    )


#: Bytes/s of one PCIe lane in one direction by generation, before protocol overhead.
_LANE: Final = {1: 250e6, 2: 500e6, 3: 985e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}


def _verdict(
    request: ResolvedRequest,
    chosen: Chosen,
    accounts: Sequence[Account],
    host: HostMemory,
    causes: tuple[str, ...],
) -> Verdict:
    """The verdict: the GPUs and the free memory, or what is missing and how much."""
    name = request.model.name
    ledgers = [ledger for account in accounts for ledger in account.at(0.0).ledgers]
    if why_not := _why_not(request, chosen, ledgers):
        return Verdict(subject=f"{name} on Transformers", why_not=why_not, causes=causes)
    if problem := host_problem(host):
        return Verdict(subject=name, why_not=problem)
    off = len(chosen.placement.offloaded)
    how = f", {off} decoder layers in host memory or on disk" if off else ""
    found = (
        f"on GPU {groups_of(chosen.groups)} with Transformers{how}:"
        f" {_at_once(chosen)} {chosen.session_len:,} tokens at a time;"
        f" {free_words(request, ledgers, chosen.groups)}"
    )
    return Verdict(subject=name, found=found)


def _why_not(request: ResolvedRequest, chosen: Chosen, ledgers: Sequence[GpuLedger]) -> str:
    """The reason why the GPUs cannot serve the request; empty if they can."""
    if chosen.keeps(request):
        return ""
    if chosen.fits:
        count, wanted = len(chosen.copies), request.promised_requests
        return f"it answers {count:,} of {wanted:,} requests at once, one a copy"
    if excess_tokens(request, chosen.vision_load):
        return too_long(request, chosen.vision_load)
    tightest = min(ledgers, key=lambda ledger: ledger.headroom - ledger.margin)
    term = max(tightest.ledger, key=lambda term: term.bytes)
    short = tightest.margin - tightest.headroom
    split = ""
    if (request.replicas or 1) > 1 and request.tp is None:
        split = "; copies are split over GPUs only where --tp asks for it too"
    return (
        f"GPU {tightest.index} is {format_bytes(short)} short even with all decoder"
        f" layers elsewhere, most of it {term.term} ({format_bytes(term.bytes)}){split}"
    )


def _at_once(chosen: Chosen) -> str:
    copies = len(chosen.copies)
    return "one request of" if copies == 1 else f"{copies} requests, one a copy, of"


def _warnings(
    request: ResolvedRequest, chosen: Chosen, placed: Mapping[str, int | str]
) -> Iterator[str]:
    yield (
        "the fallback engine is serial and slower than LMDeploy: each copy answers one request at "
        "a time, without batching, paged cache or CUDA graphs"
    )
    if chosen.placement.devices > 1:
        yield (
            f"splitting over {chosen.placement.devices} GPUs adds memory, not speed: their layers "
            "work one after the other"
        )
    yield from _slow(chosen, placed)
    if chosen.fits and (idle := idle_words(request, chosen.groups)):
        yield f"{idle}; --replicas serves on them beside it, --tp splits over them"
    if chosen.vision_load.units_per_image and chosen.fits:
        yield f"{BEYOND}: turbofit serve holds them, Transformers itself would not"


def _slow(chosen: Chosen, placed: Mapping[str, int | str]) -> Iterator[str]:
    """Yield the cost of layers off the GPUs, for each token."""
    off = chosen.placement.offloaded
    if not off or not chosen.fits:
        return
    copy = chosen.copies[0]
    size = sum(copy.parts.layers[number].weights for number in off)
    disk = list(placed.values()).count("disk")
    text = (
        f"{len(off)} of {len(copy.parts.layers)} decoder layers ({format_bytes(size)}) do not fit"
        f" on the GPUs and pass through GPU {copy.gpus[0].index} at every token"
    )
    pcie = copy.gpus[0].pcie
    rate = known(pcie.width, 0) * _LANE.get(known(pcie.generation, 0), 0.0)
    if rate:
        text += f": {size / rate:.2g} s a token at the best that its PCIe link can do"
    if disk:
        text += f"; {disk} of them are read from disk each time, which is slower still"
    yield text


def _remedies(request: ResolvedRequest, engine: LayeredEngine, closest: Chosen) -> Remedies:
    """Single changes with which it fits, cheapest first; ``closest`` is the result without any."""
    helps, causes = list[Remedy](), list[str]()

    def planned(changed: ResolvedRequest) -> Chosen | None:
        try:
            return search(changed, engine)
        except TurbofitError:
            return None

    def helped(change: Change, chosen: Chosen) -> None:
        found = f"{_at_once(chosen)} {chosen.session_len:,} tokens at a time"
        if off := len(chosen.placement.offloaded):
            found += f", {off} decoder layers in host memory (slow)"
        helps.append(fitting(change.change, found))
        causes.extend([change.released] if change.released else [])

    for change in _changes(request, closest):
        if helps and change.request.machine.name == MORE_GPUS:
            continue  # fewer such cards, or a free change, are already enough
        chosen = planned(change.request)
        if chosen is not None and chosen.keeps(change.request):
            helped(change, chosen)
    if not helps and not closest.fits:
        larger = smallest_cards(request, planned, lambda chosen: chosen.keeps(request))
        if larger is not None:
            helped(*larger)
    return Remedies(tuple(helps), tuple(causes))


def _changes(request: ResolvedRequest, closest: Chosen) -> Iterator[Change]:
    yield from left_to_turbofit(request)
    yield from smaller_workload(request, "what fits")
    rule, image_limit = request.model.image_rule, request.image_limit
    if rule is not None and image_limit is not None and image_limit > 1:
        option, half = rule.limit_option, image_limit // 2
        yield Change(
            f"{option} {half}", replace(request, image_limit=half), f"{option} {image_limit}"
        )
    if request.replicas is not None and (request.replicas > 1 or closest.fits):
        change = "leave --replicas to turbofit" if closest.fits else "--replicas 1"
        yield Change(change, replace(request, replicas=None), f"--replicas {request.replicas}")
    if request.tp is not None:
        yield Change("leave --tp to turbofit", replace(request, tp=None), f"--tp {request.tp}")
    yield from stopped(request)
    yield from with_more_gpus(request)
    if closest.fits:  # it only answers fewer requests at once than wished
        yield fewer_at_once(request, len(closest.copies))
