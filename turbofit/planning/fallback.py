"""Plans for the fallback engine, Transformers: the number of GPUs, the image limit and the context.

Each copy of the model answers one request after the other, so concurrent requests need one copy
each, up to as many copies as the GPUs hold. The checkpoint's own image limit on the fewest GPUs is
preferred, then lower limits. Decoder layers are taken off the GPUs only if no other plan serves a
request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import TurbofitError
from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.messages import BEYOND, counted, groups_of
from turbofit.core.plan import HostMemory, Settings
from turbofit.core.struct import known
from turbofit.core.units import bisect, format_bytes
from turbofit.memory.account import Account, Engine, Placement, VisionLoad
from turbofit.memory.placement import (
    ModelCopies,
    fewest_offloaded,
    filled,
    offloaded,
    place_all,
)
from turbofit.planning.plan_document import (
    document,
    free_words,
    idle_words,
)
from turbofit.planning.reasons import FAR, context_reason
from turbofit.planning.remedies import (
    Change,
    Remedies,
    fewer_at_once,
    helpful,
    left_to_turbofit,
    smaller_workload,
    stopped,
    with_more_gpus,
)
from turbofit.planning.resolved_request import (
    ResolvedRequest,
    host_of,
    host_problem,
    launch_of,
    vision_load_of,
)
from turbofit.planning.search.shapes import (
    Shape,
    check_gpus,
    chosen_dtype,
    dtype_for,
    shape_settings,
)
from turbofit.planning.search.sizing import (
    CONTEXT_STEP,
    ROUND_CONTEXT,
    excess_tokens,
    most_context,
    shortest_context,
)
from turbofit.planning.verdict import Planned, Verdict
from turbofit.planning.why_lost import too_long

#: How often the image limit is halved before decoder layers are taken off the GPUs instead.
_HALVES = 4
#: Bytes/s of one PCIe lane in one direction by generation, before protocol overhead.
_LANE: Final = {1: 250e6, 2: 500e6, 3: 985e6, 4: 1969e6, 5: 3938e6, 6: 7563e6}


@dataclass(frozen=True)
class Chosen:
    """The chosen copies of the model, the place of their layers, and their promise.

    If no choice fits, this is the choice that comes closest, and ``fits`` is False.
    """

    copies: ModelCopies
    placement: Placement
    vision_load: VisionLoad
    image_limit: int | None
    session_len: int
    fits: bool = True

    @property
    def count(self) -> int:
        return len(self.copies.groups)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(gpu.index for gpu in group) for group in self.copies.groups)

    @property
    def off(self) -> list[int]:
        """The bytes of weights of each offloaded layer of one copy."""
        layers = self.copies.parts.layers
        return [layers[number].weights for number in offloaded(self.placement)]

    @property
    def words(self) -> str:
        each = "one request of" if self.count == 1 else f"{self.count} requests, one a copy, of"
        return f"{each} {self.session_len:,} tokens at a time"

    def keeps(self, request: ResolvedRequest) -> bool:
        """Return whether the choice fits, with one copy for each request that must run at once."""
        return self.fits and self.count >= (request.promised_requests or 1)


def search(request: ResolvedRequest) -> Chosen:
    """Find the most copies that fit, up to one for each request that runs at once.

    If not even one copy fits, return the result that comes closest.
    """
    check_gpus(request)
    most = min(request.promised_requests or 1, len(request.visible) // (request.tp or 1))
    for copies in range(most, 1, -1) if request.replicas is None else ():
        chosen = _search(replace(request, replicas=copies))
        if chosen.fits:
            return chosen
    return _search(request)


def _search(request: ResolvedRequest) -> Chosen:
    """Choose the largest image limit on the fewest GPUs; else take layers off the GPUs."""
    request = _with_limit_of_size(request)
    limits = [(limit, vision_load_of(request, limit)) for limit in _limits(request)]
    possible = [pair for pair in limits if not excess_tokens(request, pair[1])]
    groupings = list(_groupings(request))
    for (limit, load), copies in product(possible, groupings):
        tokens = _longest_context(request, copies, load)
        placement = place_all(copies, load.of(tokens)) if tokens else None
        if placement is not None:
            return Chosen(copies, placement, load, limit, tokens)
    copies = groupings[-1]
    for limit, load in possible:
        # The shortest context leaves the most GPU memory to layers.
        tokens = _shortest_context(request, load)
        placement = fewest_offloaded(copies, load.of(tokens))
        if placement is not None:
            return Chosen(copies, placement, load, limit, tokens)
    # With all layers off the GPUs, the ledger shows which other part is too large.
    limit, load = limits[-1]
    nowhere = (None,) * len(copies.parts.layers)
    return Chosen(copies, nowhere, load, limit, _shortest_context(request, load), fits=False)


def _with_limit_of_size(request: ResolvedRequest) -> ResolvedRequest:
    """Replace a given image size by the image limit that admits images of this size.

    The search does not lower this limit. The engine's model folder gets the limit, so the plan
    counts the largest image that the limit admits.
    """
    rule, requested = request.model.image_rule, request.requested_image_limit
    if rule is None or request.workload.image_size is None or requested is None:
        return request
    promised = vision_load_of(request, requested).units_per_image
    whole = request.with_workload(image_size=None)
    image_limit = rule.largest_limit(promised) if rule.varies_by_limit and promised else None
    return whole if image_limit is None else replace(whole, image_limit=min(image_limit, requested))


def _limits(request: ResolvedRequest) -> Sequence[int | None]:
    """Return the image limits to try, the largest first; only the user's own limit if given."""
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
    """Return the largest image limit that the context allows, then lower limits.

    The tuple is empty if images of the ``requested`` limit already fit into the context.
    """
    vision_load = vision_load_of(request, requested)
    excess = excess_tokens(request, vision_load)
    if not excess:
        return ()
    tokens = max(0, vision_load.tokens_per_request - excess) // vision_load.images_per_request
    image_limit = rule.largest_limit(rule.units_within(tokens))
    return () if image_limit is None else rule.with_limit(image_limit).lower_limits(_HALVES)


def _groupings(request: ResolvedRequest) -> Iterator[ModelCopies]:
    """Yield ways to place the copies on groups of equal size, the smallest groups first.

    The freest cards are used. Several copies use several GPUs each only if ``tp`` and ``replicas``
    are both given.
    """

    def taken(gpu: Gpu) -> int:
        return known(gpu.used, 0) + request.margin_of(gpu) - gpu.usable

    freest = sorted(request.visible, key=lambda gpu: (taken(gpu), gpu.index))
    margins = {gpu.index: request.margin_of(gpu) for gpu in freest}
    replicas = request.replicas or 1
    most = 1 if replicas > 1 else len(freest)
    for size in range(1, most + 1) if request.tp is None else (request.tp,):
        cards = freest if size == 1 else [gpu for gpu in freest if not gpu.mig]
        chosen = cards[: size * replicas]
        if len(chosen) < size * replicas:
            return
        dtype = chosen_dtype(request.model, request.engine_options.get("dtype"), chosen)
        groups = [chosen[number::replicas] for number in range(replicas)]
        yield ModelCopies(request.model, dtype, groups, margins)


def _shortest_context(request: ResolvedRequest, vision_load: VisionLoad) -> int:
    """Return the shortest context in tokens that serves a request with its images."""
    most = most_context(request)
    return most if request.context_given else min(shortest_context(vision_load), most)


def _longest_context(request: ResolvedRequest, copies: ModelCopies, vision_load: VisionLoad) -> int:
    """Return the context in tokens that all copies hold on their GPUs; 0 if they hold no request.

    The result is the longest context that fits. If the context is given or the least memory is
    wished, the result is the shortest sufficient context.
    """

    def fits(tokens: int) -> bool:
        return filled(copies, vision_load.of(tokens)) is not None

    shortest, longest = (
        _shortest_context(request, vision_load),
        request.model.text.max_position_embeddings,
    )
    if not fits(shortest):
        return 0
    if request.context_given or request.least:
        return shortest
    if fits(longest):
        return longest
    tokens = bisect(fits, shortest, longest, CONTEXT_STEP)[0]
    rounded = tokens // ROUND_CONTEXT * ROUND_CONTEXT
    return rounded if rounded >= shortest else max(shortest, tokens // CONTEXT_STEP * CONTEXT_STEP)


def plan_fallback(request: ResolvedRequest, engine: Engine, reason: str) -> Planned:
    """Make the best plan on Hugging Face Transformers, without command lines.

    ``tp`` of the request is the number of GPUs for one copy's layers (None: as few as possible).
    ``replicas`` is the number of copies (None: one for each concurrent request that is promised, if
    they fit). ``reason`` is a clause that says why no engine of LMDeploy is used.

    Raises:
        UsageError: a part of the request cannot be used with this engine.
    """
    chosen = search(request)
    copies, limit, context = chosen.copies, chosen.image_limit, chosen.session_len
    shape = Shape(
        tp=1,
        groups=chosen.groups,
        max_prefill_token_num=context,
        image_limit=limit,
        dtype=copies.dtype,
        at_once=1,
    )
    settings = shape_settings(request, shape, context)
    accounts = []
    for gpus in copies.groups:
        launch = launch_of(request, settings, gpus, chosen.vision_load)
        accounts.append(engine.account(replace(launch, placement=chosen.placement)))
    host, kept = _host(chosen, host_of(request, accounts, engine))
    placed = copies.device_map(chosen.placement, kept)
    helps = Remedies() if chosen.keeps(request) else _remedies(request, chosen)
    verdict = _verdict(request, chosen, accounts, host, helps.causes)
    many = "one copy" if chosen.count == 1 else f"{chosen.count} copies"
    each = "one GPU each" if copies.devices == 1 else f"layers split over {copies.devices} GPUs"
    is_asked = request.tp is not None or request.replicas is not None
    as_asked = ": as asked" if is_asked else ""
    plan = document(
        request,
        engine,
        accounts,
        fits=verdict.fits,
        verdict=verdict.text,
        parallel_reason=f"{many}, {each}{as_asked}",
        host=host,
        settings=settings,
        vision_load=chosen.vision_load,
        image_limit=limit,
        reasons=tuple(_reasons(request, chosen, settings, reason)),
        warnings=_warnings(request, chosen, placed),
        remedies=helps.remedies,
        device_map=placed,
    )
    return Planned(plan=plan, verdict=verdict)


def _host(chosen: Chosen, host: HostMemory) -> tuple[HostMemory, int | None]:
    """Return the host memory of all copies, and the bytes that one copy's offloaded layers may use.

    Layers that do not fit into host memory stay on disk, and only the largest of them is in memory
    at a time. The second value is None if the available memory is unknown.
    """
    taken, kept = sum(chosen.off), None
    if host.available is not None:
        taken = max(chosen.off, default=0)
        kept = left = max(0, (host.available - host.pageable) // chosen.count - taken)
        for size in chosen.off:
            left -= size
            taken += size if left >= 0 else 0
    return replace(host, pageable=host.pageable + taken * chosen.count), kept


def _reasons(
    request: ResolvedRequest, chosen: Chosen, settings: Settings, reason: str
) -> Iterator[str]:
    """Yield why the plan uses Transformers, and why each setting has its value."""
    yield f"engine transformers: {reason}"
    yield "max_batch_size 1: this engine answers one request after the other"
    context = settings.session_len
    yield f"session_len {context}: {context_reason(request, context, held='fits')}"
    gpus = [gpu for group in chosen.copies.groups for gpu in group]
    given = "as set by you" if request.engine_options.get("dtype") else ""
    yield f"dtype {settings.dtype}: {given or dtype_for(request.model, gpus)[1]}"
    if any(chosen.copies.writes_matrix):
        yield (
            "attention is charged with the matrix of all pairs of tokens: torch has no other "
            "kernel for grouped heads on cards before Ampere"
        )
    limit, requested = chosen.image_limit, request.requested_image_limit
    if limit is not None and chosen.vision_load.units_per_image:
        why = f"lowered from {requested} to what fits, or to what images of the given size take"
        if limit == requested:
            why = "the model's own" if request.image_limit is None else "as set by you"
        yield f"image limit {limit}: {why}"


def _verdict(
    request: ResolvedRequest,
    chosen: Chosen,
    accounts: Sequence[Account],
    host: HostMemory,
    causes: tuple[str, ...],
) -> Verdict:
    """Return the verdict: the GPUs and the free memory, or what is missing and how much."""
    name = request.model.name
    ledgers = [ledger for account in accounts for ledger in account.ledgers_at(0.0)]
    if chosen.keeps(request):
        if problem := host_problem(host):
            return Verdict(subject=name, problem=problem)
        off = len(chosen.off)
        how = f", {counted(off, 'decoder layer')} in host memory or on disk" if off else ""
        found = (
            f"on GPU {groups_of(chosen.groups)} with Transformers{how}: {chosen.words};"
            f" {free_words(request, ledgers, chosen.groups)}"
        )
        return Verdict(subject=name, found=found)
    if chosen.fits:
        wanted = request.promised_requests
        problem = f"it answers {chosen.count:,} of {wanted:,} requests at once, one a copy"
    elif excess_tokens(request, chosen.vision_load):
        problem = too_long(request, chosen.vision_load)
    else:
        tightest = min(ledgers, key=lambda ledger: ledger.headroom - ledger.margin)
        term = max(tightest.terms, key=lambda term: term.bytes)
        problem = (
            f"GPU {tightest.index} is {format_bytes(tightest.margin - tightest.headroom)} short"
            " even with all decoder layers elsewhere, most of it"
            f" {term.term} ({format_bytes(term.bytes)})"
        )
        if (request.replicas or 1) > 1 and request.tp is None:
            problem += "; only --tp splits each of several copies over GPUs"
    return Verdict(subject=f"{name} on Transformers", problem=problem, causes=causes)


def _warnings(
    request: ResolvedRequest, chosen: Chosen, placed: Mapping[str, int | str]
) -> Iterator[str]:
    """Yield the plan's warnings, for example about slow layers or idle GPUs."""
    yield (
        "the fallback engine is serial and slower than LMDeploy: each copy answers one request at "
        "a time, without batching, paged cache or CUDA graphs"
    )
    if chosen.copies.devices > 1:
        yield (
            f"splitting over {chosen.copies.devices} GPUs adds memory, not speed: their layers "
            "work one after the other"
        )
    if not chosen.fits:
        return
    if off := chosen.off:
        size, first = sum(off), chosen.copies.groups[0][0]
        text = (
            f"the GPUs have no room for {len(off)} of {len(chosen.placement)} decoder layers"
            f" ({format_bytes(size)}), which pass through GPU {first.index} at every token"
        )
        if rate := known(first.pcie.width, 0) * _LANE.get(known(first.pcie.generation, 0), 0.0):
            text += f": {size / rate:.2g} s a token at the best that its PCIe link can do"
        if disk := list(placed.values()).count("disk"):
            text += f"; {disk} of them are read from disk each time, which is slower still"
        yield text
    if idle := idle_words(request, chosen.groups):
        yield from _on_more_cards(request, chosen)
        yield f"{idle}; --replicas starts copies on these GPUs, --tp splits a copy over them"
    if chosen.vision_load.units_per_image:
        yield f"{BEYOND}: turbofit serve keeps these limits, Transformers itself does not"


def _on_more_cards(request: ResolvedRequest, chosen: Chosen) -> Iterator[str]:
    """Yield the context that a copy holds on more GPUs, if that is far more than the plan's."""
    if chosen.count > 1 or request.context_given:
        return
    for copies in _groupings(request):
        tokens = _longest_context(request, copies, chosen.vision_load)
        if chosen.session_len < FAR * tokens:
            yield f"--tp {copies.devices} holds one request of {tokens:,} tokens"
            return


def _remedies(request: ResolvedRequest, closest: Chosen) -> Remedies:
    """Return single changes that make the plan fit, cheapest first.

    ``closest`` is the best choice without a change.
    """

    def effect_of(changed: ResolvedRequest) -> tuple[bool, str]:
        try:
            chosen = search(changed)
        except TurbofitError:
            return False, ""
        if not chosen.keeps(changed):
            return False, ""
        off = len(chosen.off)
        slow = f", {counted(off, 'decoder layer')} in host memory (slow)" if off else ""
        return True, f"{chosen.words}{slow}"

    return helpful(_changes(request, closest), effect_of, enough=False, cheap=True)


def _changes(request: ResolvedRequest, closest: Chosen) -> Iterator[Change]:
    """Yield the changes to try, cheapest first."""
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
    if closest.fits:  # only the number of requests at once is too small
        yield fewer_at_once(request, closest.count)
