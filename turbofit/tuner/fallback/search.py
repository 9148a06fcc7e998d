"""How many GPUs, which image limit and how much context: the fewest, the largest, the most.

A copy answers one request after the other: where so many must be answered at once there are as
many copies, or as many as the GPUs hold.

The order of preference: the checkpoint's own image limit on the fewest GPUs; then lower limits;
and decoder layers off the GPUs only where nothing else serves a request at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.struct import known
from turbofit.memory.account import VisionLoad
from turbofit.memory.transformers.activations import (
    ModelCopy,
    Placement,
    fewest_offloaded,
    holds,
    load_of,
    nowhere,
    place_all,
)
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.shape import chosen_dtype
from turbofit.tuner.search.shapes import split_over_slices
from turbofit.tuner.search.sizing import (
    CONTEXT_STEP,
    ROUND_CONTEXT,
    bisect,
    excess_tokens,
    shortest_context,
)

__all__ = ["Chosen", "search"]

#: Pixels are halved so often before decoder layers are taken off the GPUs instead.
_HALVES = 4

#: GPUs of each copy, equally many.
_Groups = tuple[tuple[int, ...], ...]


class Chosen(NamedTuple):
    """What was found: groups of GPUs, a placement that is good for each, and the request.

    ``fits`` False: the placement is the closest to fitting.
    """

    copies: Sequence[ModelCopy]
    placement: Placement
    vision_load: VisionLoad
    limit: int | None
    session_len: int
    fits: bool = True

    def keeps(self, request: ResolvedRequest) -> bool:
        """Whether it fits, with as many copies as requests must be answered at once."""
        return self.fits and len(self.copies) >= (request.promised_requests or 1)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The GPUs of each copy."""
        return tuple(tuple(gpu.index for gpu in copy.gpus) for copy in self.copies)


def search(request: ResolvedRequest) -> Chosen:
    """The placement to launch.

    Raises:
        UsageError: something asked for cannot be used with this engine.
    """
    _check(request)
    most = min(request.promised_requests or 1, len(request.visible) // (request.tp or 1))
    for copies in range(most, 1, -1) if request.replicas is None else ():
        found = _search(replace(request, replicas=copies))
        if found.fits:
            return found
    return _search(request)


def _search(request: ResolvedRequest) -> Chosen:
    request = _held(request)
    every: list[int | None] = list(_limits(request))
    limits = [
        limit for limit in every if not excess_tokens(request, vision_load_of(request, limit))
    ]
    groupings = list(_groupings(request))
    for limit in limits:
        vision_load = vision_load_of(request, limit)
        for groups in groupings:
            found = _on_gpus(request, groups, vision_load, limit)
            if found is not None:
                return found
    copies = _copies(request, groupings[-1])
    for limit in limits:  # the shortest context, so that as few layers as possible are off the GPUs
        vision_load = vision_load_of(request, limit)
        tokens = _shortest(request, vision_load)
        placement = fewest_offloaded(_Tightest(copies), load_of(vision_load, tokens))
        if placement is not None:
            return Chosen(copies, placement, vision_load, limit, tokens)
    # Every layer off the GPUs, so that what is left is what is too large.
    vision_load = vision_load_of(request, every[-1])
    tokens = _shortest(request, vision_load)
    return Chosen(copies, nowhere(copies[0]), vision_load, every[-1], tokens, fits=False)


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
    """A stated image size as an image limit, which like any that is given is not lowered.

    This engine reads no limit from a request: only the limit in the model folder lowers larger
    images, so that the plan must pay for the worst image under that limit.
    """
    rule, requested = request.model.image_rule, request.requested_limit
    if rule is None or request.workload.image_size is None or requested is None:
        return request
    promised = vision_load_of(request, requested).units_per_image
    whole = request.with_workload(image_size=None)
    limit = rule.largest_limit(promised) if rule.varies_by_limit and promised else None
    return whole if limit is None else whole.with_limit(min(limit, requested))


def _limits(request: ResolvedRequest) -> Iterator[int | None]:
    """Image limits worth trying; one that the user set is not changed."""
    rule, requested = request.model.image_rule, request.requested_limit
    if rule is None or requested is None or vision_load_of(request, requested).units_per_image == 0:
        yield None
        return
    if request.fixed_limit is not None:
        yield requested
        return
    steps = {requested}
    if rule.varies_by_limit:
        steps = {*rule.lower_limits(_HALVES), *_within_context(request, rule, requested)}
    seen = -1
    for limit in sorted(steps, reverse=True):
        units = vision_load_of(request, limit).units_per_image
        if units != seen:
            yield limit
        seen = units


def _within_context(request: ResolvedRequest, rule: ImageRule, requested: int) -> tuple[int, ...]:
    """The largest image limit that a short context holds, and its halves; none for a long one."""
    vision_load = vision_load_of(request, requested)
    excess = excess_tokens(request, vision_load)
    if not excess:
        return ()
    tokens = max(0, vision_load.tokens_per_request - excess) // vision_load.images_per_request
    limit = rule.largest_limit(rule.units_within(tokens))
    return () if limit is None else rule.with_limit(limit).lower_limits(_HALVES)


def _groupings(request: ResolvedRequest) -> Iterator[_Groups]:
    """Groups of GPUs, the fewest first; the freest cards first.

    Copies side by side are split over several GPUs only where both are asked for.
    """

    def taken(gpu: Gpu) -> int:
        return known(gpu.used, 0) + request.margin_of(gpu) - gpu.usable

    freest = sorted(request.visible, key=lambda gpu: (taken(gpu), gpu.index))
    replicas = request.replicas or 1
    if request.tp is not None:
        sizes: Sequence[int] = (request.tp,)
    elif request.replicas is not None and request.replicas > 1:
        sizes = (1,)
    else:
        sizes = range(1, len(freest) + 1)
    for size in sizes:
        cards = freest if size == 1 else [gpu for gpu in freest if not gpu.mig]
        if len(cards) < size * replicas:
            return
        chosen = cards[: size * replicas]
        groups = [chosen[number::replicas] for number in range(replicas)]
        yield tuple(tuple(gpu.index for gpu in group) for group in groups)


def _copies(request: ResolvedRequest, groups: _Groups) -> list[ModelCopy]:
    cards = [[request.machine.gpu(index) for index in group] for group in groups]
    everywhere = [gpu for group in cards for gpu in group]
    dtype = chosen_dtype(request.model, request.fixed.get("dtype"), everywhere)
    return [
        ModelCopy(request.model, dtype, group, [request.margin_of(gpu) for gpu in group])
        for group in cards
    ]


class _Tightest(ModelCopy):
    """One copy for all groups: place by place the least room, and the matrix where one writes it.

    Over: a group with more room could hold more layers early, and the card that writes the matrix
    of attention may be the one with more room.
    """

    def __init__(self, copies: Sequence[ModelCopy]) -> None:
        first = copies[0]
        super().__init__(first.model, first.dtype, first.gpus, first.margins)
        self._copies = tuple(copies)

    def room(self, place: int) -> int:
        """The least of all groups."""
        return min(copy.room(place) for copy in self._copies)

    def writes_matrix(self, place: int) -> bool:
        """Whether attention writes the matrix in one of the groups."""
        return any(copy.writes_matrix(place) for copy in self._copies)


def _wanted(request: ResolvedRequest) -> int | None:
    """The context that the user fixed."""
    fixed = request.fixed.get("session_len", request.workload.context)
    return fixed if isinstance(fixed, int) else None


def _shortest(request: ResolvedRequest, vision_load: VisionLoad) -> int:
    wanted = _wanted(request)
    if wanted is not None:
        return wanted
    return min(shortest_context(vision_load), request.model.text.max_position_embeddings)


def _on_gpus(
    request: ResolvedRequest, groups: _Groups, vision_load: VisionLoad, limit: int | None
) -> Chosen | None:
    copies = _copies(request, groups)
    tightest, tokens = _Tightest(copies), _shortest(request, vision_load)
    if not holds(tightest, load_of(vision_load, tokens)):
        return None
    if _wanted(request) is None and not request.least:
        tokens = _longest(request, tightest, vision_load, tokens)
    placement = place_all(tightest, load_of(vision_load, tokens))
    assert placement is not None
    return Chosen(copies, placement, vision_load, limit, tokens)


def _longest(request: ResolvedRequest, copy: ModelCopy, vision_load: VisionLoad, low: int) -> int:
    """The model's own context, lowered to what fits."""

    def fits(tokens: int) -> bool:
        return holds(copy, load_of(vision_load, tokens))

    shortest, high = low, request.model.text.max_position_embeddings
    if fits(high):
        return high
    low, _ = bisect(fits, low, high, CONTEXT_STEP)
    rounded = low // ROUND_CONTEXT * ROUND_CONTEXT
    return rounded if rounded >= shortest else max(shortest, low // CONTEXT_STEP * CONTEXT_STEP)
