"""How many GPUs, which image limit and how much context: the fewest, the largest, the most.

The order of preference: the checkpoint's own image limit on the fewest GPUs; then lower limits;
and decoder layers off the GPUs only where nothing else serves a request at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.core.struct import Struct, known
from turbofit.memory.transformers.ledgers import Load, Placement, TransformersAccount
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.fallback.cut import fewest_offloaded, holds, place_all
from turbofit.tuner.resolved_request import ResolvedRequest, vision_load_of
from turbofit.tuner.search.constraints import dtype_for, dtype_problem
from turbofit.tuner.search.sizing import excess_tokens, shortest_context

__all__ = ["Chosen", "load_of", "search"]

_STEP = 64
_ROUND = 1024
#: Pixels are halved so often before decoder layers are taken off the GPUs instead.
_HALVES = 4


class Chosen:
    """What was found: groups of GPUs, a placement that is good for each, and the request.

    ``fits`` False: the placement is the closest to fitting.
    """

    def __init__(
        self,
        accounts: Sequence[TransformersAccount],
        placement: Placement,
        vision_load: VisionLoad,
        limit: int | None,
        session_len: int,
        *,
        fits: bool,
    ) -> None:
        self.accounts, self.placement = tuple(accounts), placement
        self.vision_load, self.limit, self.session_len = vision_load, limit, session_len
        self.fits = fits

    @property
    def load(self) -> Load:
        """The request that the account pays for."""
        return load_of(self.vision_load, self.session_len)


class _Shape(Struct):
    """GPUs of each copy; all groups have equally many."""

    groups: tuple[tuple[int, ...], ...]


def load_of(vision_load: VisionLoad, tokens: int) -> Load:
    """The worst request of so many tokens."""
    return Load(
        tokens=tokens, images=vision_load.images_per_request, units=vision_load.units_per_request
    )


def search(request: ResolvedRequest) -> Chosen:
    """The placement to launch.

    Raises:
        UsageError: something asked for cannot be used with this engine.
    """
    _check(request)
    request = _held(request)
    every: list[int | None] = list(_limits(request))
    limits = [
        limit for limit in every if not excess_tokens(request, vision_load_of(request, limit))
    ]
    shapes = list(_shapes(request))
    for limit in limits:
        vision_load = vision_load_of(request, limit)
        for shape in shapes:
            found = _on_gpus(request, shape, vision_load, limit)
            if found is not None:
                return found
    largest = shapes[-1]
    for limit in limits:
        found = _offloading(request, largest, vision_load_of(request, limit), limit)
        if found is not None:
            return found
    return _closest(request, largest, every[-1])


def _check(request: ResolvedRequest) -> None:
    if not request.visible:
        raise UsageError("there is no GPU to plan for", hint="see turbofit machine")
    wanted = (request.tp or 1) * (request.replicas or 1)
    if wanted > len(request.visible):
        raise UsageError(
            f"{wanted} GPUs are asked for, {len(request.visible)} may be used",
            hint="lower --tp (GPUs that one copy is split over) or --replicas",
        )


def _held(request: ResolvedRequest) -> ResolvedRequest:
    """A stated image size as an image limit.

    This engine heeds no parameter of a request: what holds larger images down is the limit in the
    model folder alone, so that the limit's own worst image is what must be paid for.
    """
    rule, size, own = request.model.image_rule, request.workload.image_size, request.own_limit
    if rule is None or size is None or own is None:
        return request
    promised = vision_load_of(request, own).units_per_image
    whole = replace(request, workload=replace(request.workload, image_size=None))
    limit = rule.largest_limit(promised) if rule.varies_by_limit and promised else None
    if limit is None or limit >= own:
        return whole
    return whole.with_limit(limit)


def _limits(request: ResolvedRequest) -> Iterator[int | None]:
    """Image limits worth trying; one that the user set is not changed."""
    rule, own = request.model.image_rule, request.own_limit
    if rule is None or own is None or vision_load_of(request, own).units_per_image == 0:
        yield None
        return
    if request.fixed_limit is not None:
        yield own
        return
    steps = rule.lower_limits(_HALVES) if rule.varies_by_limit else (own,)
    seen = -1
    for limit in steps:
        units = vision_load_of(request, limit).units_per_image
        if units != seen:
            yield limit
        seen = units


def _shapes(request: ResolvedRequest) -> Iterator[_Shape]:
    """Groups of GPUs, the fewest first; the freest cards first.

    Copies side by side are split over several GPUs only where both are asked for.
    """
    freest = sorted(request.visible, key=lambda gpu: (-_free(request, gpu), gpu.index))
    replicas = request.replicas or 1
    if request.tp is not None:
        sizes: Sequence[int] = (request.tp,)
    elif request.replicas is not None and request.replicas > 1:
        sizes = (1,)
    else:
        sizes = range(1, len(freest) + 1)
    for size in sizes:
        chosen = freest[: size * replicas]
        groups = [chosen[number::replicas] for number in range(replicas)]
        yield _Shape(groups=tuple(tuple(gpu.index for gpu in group) for group in groups))


def _free(request: ResolvedRequest, gpu: Gpu) -> int:
    usable = known(gpu.total, 0) - known(gpu.reserved, 0) - known(gpu.used, 0)
    return usable - request.margin_of(gpu)


def _accounts(request: ResolvedRequest, shape: _Shape) -> list[TransformersAccount]:
    gpus = [request.machine.gpu(index) for group in shape.groups for index in group]
    dtype = _dtype(request, gpus)
    made = []
    for group in shape.groups:
        cards = [request.machine.gpu(index) for index in group]
        made.append(
            TransformersAccount(
                request.model, dtype, cards, [request.margin_of(gpu) for gpu in cards]
            )
        )
    return made


def _dtype(request: ResolvedRequest, gpus: Sequence[Gpu]) -> str:
    """The user's dtype, else what these GPUs can.

    Raises:
        UsageError: they cannot what the user set.
    """
    fixed = request.fixed.get("dtype")
    if fixed in (None, "auto"):
        return dtype_for(request.model, gpus)[0]
    problem = dtype_problem(request.model, fixed, gpus)
    if problem is not None:
        raise UsageError(problem, hint="leave --dtype out")
    return cast("str", fixed)


def _tightest(accounts: Sequence[TransformersAccount]) -> TransformersAccount:
    """One account for all groups: place by place the card with the least room.

    Over: a group with more room could hold more layers early.
    """
    if len(accounts) == 1:
        return accounts[0]
    first = accounts[0]
    cards, margins = [], []
    for place in range(len(first.gpus)):
        worst = min(accounts, key=lambda account: account.room(place))
        cards.append(worst.gpus[place])
        margins.append(worst.margins[place])
    return TransformersAccount(first.model, first.dtype, cards, margins)


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
    request: ResolvedRequest, shape: _Shape, vision_load: VisionLoad, limit: int | None
) -> Chosen | None:
    accounts = _accounts(request, shape)
    tightest, tokens = _tightest(accounts), _shortest(request, vision_load)
    if not holds(tightest, load_of(vision_load, tokens)):
        return None
    if _wanted(request) is None:
        tokens = _longest(request, tightest, vision_load, tokens)
    placement = place_all(tightest, load_of(vision_load, tokens))
    assert placement is not None
    return Chosen(accounts, placement, vision_load, limit, tokens, fits=True)


def _longest(
    request: ResolvedRequest, account: TransformersAccount, vision_load: VisionLoad, low: int
) -> int:
    """The model's own context, lowered to what fits."""

    def fits(tokens: int) -> bool:
        return holds(account, load_of(vision_load, tokens))

    shortest, high = low, request.model.text.max_position_embeddings
    if fits(high):
        return high
    while high - low > _STEP:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    rounded = low // _ROUND * _ROUND
    return rounded if rounded >= shortest else max(shortest, low // _STEP * _STEP)


def _offloading(
    request: ResolvedRequest, shape: _Shape, vision_load: VisionLoad, limit: int | None
) -> Chosen | None:
    """With decoder layers off the GPUs: the shortest context, so that as few as possible are."""
    accounts = _accounts(request, shape)
    tokens = _shortest(request, vision_load)
    placement = fewest_offloaded(_tightest(accounts), load_of(vision_load, tokens))
    if placement is None:
        return None
    return Chosen(accounts, placement, vision_load, limit, tokens, fits=True)


def _closest(request: ResolvedRequest, shape: _Shape, limit: int | None) -> Chosen:
    """What does not fit: every layer off the GPUs, so that what is left is what is too large."""
    accounts, vision_load = _accounts(request, shape), vision_load_of(request, limit)
    count = len(accounts[0].parts.layers)
    placement = Placement(devices=len(accounts[0].gpus), layers=(None,) * count)
    return Chosen(
        accounts, placement, vision_load, limit, _shortest(request, vision_load), fits=False
    )
