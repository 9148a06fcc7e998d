"""The shapes that LMDeploy could run on the visible GPUs: their groups and settings.

All forecasts are equal for groupings of equally full cards with equal links, so only the grouping
with the smallest indices is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, combinations, islice, product
from math import ceil
from typing import Any, Final, Literal

import msgspec

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model
from turbofit.core.plan import ALIKE, Candidate, Settings, sets_of
from turbofit.core.struct import Struct, known
from turbofit.core.units import grouped
from turbofit.memory.account import AMPERE, HOPPER, Engine, VisionLoad, capability_of
from turbofit.planning.resolved_request import ResolvedRequest, vision_load_of
from turbofit.planning.speed import Speed, group_class, reduce_class
from turbofit.planning.tower import whole_image_prefill

#: The significant digits to which a value that ranks shapes is rounded.
_DIGITS: Final = 9
_CANDIDATE_SETTINGS: Final = (
    "max_prefill_token_num", "max_batch_size", "session_len", "cache_max_entry_count"
)  # fmt: skip
PREFILL_SIZES = (8192, 4096, 2048, 1024)
_LARGEST_TP = 8
#: With more equal GPUs than this, only the grouping of `_in_order` is tried.
_EXHAUSTIVE = 8
#: For each kind of card and each tp, at most this many groupings are combined with other kinds.
_MIXED = 4
#: At most this many combinations of kinds are tried, and twice as many groupings returned.
_MOST_MIXED = 48
Group = tuple[int, ...]


class Shape(Struct):
    """One candidate of the search: groups of GPUs, a prefill size, an image limit and a dtype.

    ``units_per_forward`` are the vision units that the peak counts; None: the engine's own bound.
    ``promised`` is the context in tokens that engines on other cards hold. ``at_once`` is the
    average number of requests that each group runs. If ``at_once`` is None, each group runs an
    equal share of the workload's requests; if their number is not given either, `best_batch`
    chooses it (one request for the least memory). Groups on unequal cards choose their prefill size
    for themselves.
    """

    tp: int
    groups: tuple[tuple[int, ...], ...]
    max_prefill_token_num: int
    image_limit: int | None
    dtype: str
    units_per_forward: int | None = None
    promised: int | None = None
    at_once: float | None = None

    @property
    def replicas(self) -> int:
        return len(self.groups)

    def requests(self, concurrency: int | None) -> float:
        """Return how many requests one group runs at once: ``at_once``, or else an equal share.

        The share is of ``concurrency``, the requests of all groups together; None counts as one
        request for each group.
        """
        if self.at_once is not None:
            return self.at_once
        return 1.0 if concurrency is None else concurrency / self.replicas


def rounded(value: float) -> float:
    """Round a value so that sums of the same speeds in another order are equal."""
    return float(f"{value:.{_DIGITS}g}")


class Evaluation(Struct):
    """A shape with its settings, and whether it can serve.

    ``short``: bytes missing on the tightest GPU, 0 if the shape serves. ``score``: the goal's
    value. ``served``: the share of a request's wished vision units that is served. ``queues``:
    image requests wait although the person did not ask for this. ``joined``: the sets of equal
    groups if cards are unequal; ``settings`` and ``kv_tokens`` are then those of the weakest set.
    ``speeds``: one for each group, in order. ``seconds_per_answer``: of the slowest group, for the
    goal ``latency``. ``wants_cache``: more cache would run more requests at once. ``footprint``:
    bytes on all GPUs, if the least memory is wished. ``held_requests``: requests that all engines
    hold at once, if a number is promised; if too few are held, ``settings`` have the largest batch
    that the caches hold.

    ``ranked`` is the value that ranks shapes. For throughput, it is the requests a second as if the
    tower's attention took no time: the attention of a worst image would outweigh what a larger
    cache gains for smaller images and texts. ``ranked`` is not rounded, so that it can be summed
    over parts.
    """

    engine: str
    shape: Shape
    settings: Settings
    vision_load: VisionLoad
    kv_tokens: int
    fits: bool
    score: float = 0.0
    served: float = 1.0
    queues: bool = False
    short: int = 0
    speeds: tuple[Speed, ...] = ()
    seconds_per_answer: float = 0.0
    wants_cache: bool = False
    footprint: int = 0
    held_requests: int = 0
    joined: tuple[Evaluation, ...] = ()
    ranked: float = 0.0

    def gpus(self, machine: Machine) -> list[Gpu]:
        """Return the GPUs of all groups."""
        return [machine.gpu(index) for group in self.shape.groups for index in group]

    @property
    def parts(self) -> tuple[Evaluation, ...]:
        """One evaluation for each set of equal groups."""
        return self.joined or (self,)

    @property
    def engines(self) -> tuple[Evaluation, ...]:
        """For each group, in order, the evaluation of the set that contains it."""
        by_group = {group: part for part in self.parts for group in part.shape.groups}
        return tuple(by_group[group] for group in self.shape.groups)

    @property
    def serves(self) -> bool:
        """Whether the shape serves, perhaps with fewer requests at once than wished."""
        return self.fits or self.held_requests > 0

    @property
    def worth(self) -> tuple[float, ...]:
        """The first part of `rank`: image size, context, less memory, then the goal's value.

        Memory counts only if the least is wished. Promises precede speed, so that more memory never
        makes a promise smaller.
        """
        context = self.settings.session_len
        return (self.served, context, -self.footprint, rounded(self.ranked))

    @property
    def rank(self) -> tuple[float, ...]:
        """The part of `search_order` for shapes that fit.

        Shapes of equal worth are ranked by queues, KV tokens, prefill size and GPUs of an engine.
        """
        prefill, tp = self.shape.max_prefill_token_num, self.shape.tp
        return (*self.worth, not self.queues, self.kv_tokens, prefill, -tp)

    @property
    def search_order(self) -> tuple[object, ...]:
        """The sort key by which `_Search.best` takes the best shape: the largest key wins.

        Shapes that fit are above all others, and ordered by `rank`. Shapes that do not fit are
        ordered by the requests that they hold and the missing bytes. Of equal shapes, the shape
        with the smallest indices of GPUs wins.
        """
        indices = tuple(-index for group in self.shape.groups for index in group)
        if self.fits:
            return (1, *self.rank, indices)
        return (
            0,
            self.held_requests,
            self.served if self.held_requests else 0.0,
            -self.short,
            -self.shape.tp,
            self.shape.max_prefill_token_num,
            indices,
        )

    def candidate(self, why_not: str, *, shows_score: bool) -> Candidate:
        """Return the row of ``considered``; without ``shows_score`` its score is null."""

        def kept(settings: Settings) -> dict[str, Any]:
            return {name: getattr(settings, name) for name in _CANDIDATE_SETTINGS}

        settings = kept(self.settings)
        if len(self.parts) > 1:
            settings["engines"] = [kept(part.settings) for part in self.engines]
        if self.shape.image_limit is not None:
            settings["limit"] = self.shape.image_limit
        return Candidate(
            engine=self.engine,
            tp=self.shape.tp,
            replicas=self.shape.replicas,
            groups=self.shape.groups,
            settings=settings,
            fits=self.fits,
            kv_tokens=self.kv_tokens,
            score=self.score if shows_score or not self.fits else None,
            why_not=why_not,
        )


def shape_settings(request: ResolvedRequest, shape: Shape, session_len: int) -> Settings:
    """Return the engine's settings for a shape; options that the user gave are kept."""
    quantization = request.model.quantization
    chosen: dict[str, object] = {
        "dtype": shape.dtype,
        "max_batch_size": max(1, ceil(shape.requests(request.workload.concurrency))),
        "session_len": session_len,
        "model_format": quantization.method if quantization else None,
        "enable_prefix_caching": request.prefix_caching,
    }
    chosen.update(request.engine_options)
    chosen.update(tp=shape.tp, max_prefill_token_num=shape.max_prefill_token_num)
    return msgspec.convert(chosen, Settings)


def dtype_for(model: Model, gpus: Sequence[Gpu]) -> tuple[Literal["float16", "bfloat16"], str]:
    """Return the dtype that ``auto`` means on these GPUs, and the reason.

    AWQ, GPTQ and packed int4 need float16, but gated delta nets in int4 run in bfloat16 on Hopper.
    Cards before Ampere have no bfloat16; a card of unknown capability counts as Ampere.
    """
    packed = model.quantization
    cards = [capability_of(gpu, unknown=AMPERE) for gpu in gpus]
    if packed is not None and packed.bits == 4 and not packed.of_experts:
        if model.text.delta is not None and all(card == HOPPER for card in cards):
            return "bfloat16", "gated delta nets run in bfloat16 on Hopper"
        return "float16", f"{packed.method} runs in float16"
    if any(card < AMPERE for card in cards):
        return "float16", "these GPUs have no bfloat16"
    if model.dtype == "float16":
        return "float16", "the checkpoint's own"
    return "bfloat16", "the checkpoint's own" if model.dtype == "bfloat16" else "of float32"


def chosen_dtype(model: Model, fixed: object, gpus: Sequence[Gpu]) -> str:
    """Return the dtype that the user gave, or that ``auto`` means on these GPUs.

    Raises:
        UsageError: the GPUs cannot run the given dtype, and LMDeploy would silently change it.
    """
    possible, why = dtype_for(model, gpus)
    if not isinstance(fixed, str) or fixed == "auto":
        return possible
    if fixed == "bfloat16" and possible == "float16" and why != "the checkpoint's own":
        raise UsageError(
            f"`--dtype bfloat16` cannot run: {why}",
            hint="leave `--dtype` out: float16 is chosen where it is needed",
        )
    return fixed


def shapes(request: ResolvedRequest, engine: Engine) -> Iterator[Shape]:
    """Yield the shapes to search: each grouping of the GPUs with each prefill size."""
    prefills = prefill_sizes(request, engine)
    for groups in _groupings(request, engine):
        gpus = [request.machine.gpu(index) for group in groups for index in group]
        dtype = chosen_dtype(request.model, request.engine_options.get("dtype"), gpus)
        mixed_cards = len(like_groups(request.machine, groups)) > 1
        for prefill in prefills[:1] if mixed_cards else prefills:
            yield Shape(
                tp=max(map(len, groups)),
                groups=groups,
                max_prefill_token_num=prefill,
                image_limit=request.requested_image_limit,
                dtype=dtype,
            )


def prefill_sizes(request: ResolvedRequest, engine: Engine) -> tuple[int, ...]:
    """Return the given prefill size, or the sizes to try.

    If the engine encodes an image again in each forward that has a part of it, one size holds the
    largest image whole.
    """
    fixed = request.engine_options.get("max_prefill_token_num")
    if isinstance(fixed, int):
        return (fixed,)
    rule, images = request.model.image_rule, vision_load_of(request, request.requested_image_limit)
    if rule is None or not engine.encodes_again or not images.units_per_image:
        return PREFILL_SIZES
    whole = whole_image_prefill(rule.unit_tokens(images.units_per_image))
    fits = PREFILL_SIZES[0] < whole <= request.model.text.max_position_embeddings
    return (whole, *PREFILL_SIZES) if fits else PREFILL_SIZES


def _groupings(request: ResolvedRequest, engine: Engine) -> Sequence[tuple[Group, ...]]:
    """Return the ways to divide the visible GPUs into groups.

    Groups of unequal cards are formed only if no other groups are possible.
    """
    if request.groups is not None:
        return [request.groups]
    found = _mixed(request, engine)
    for gpus in kinds(request.visible):
        for tp in _tps(request, gpus, engine):
            for replicas in _replicas(request, len(gpus) // tp):
                found += ways(request.machine, gpus, tp, replicas)
    return found or list(_unequal_groupings(request, engine))


def _mixed(request: ResolvedRequest, engine: Engine) -> list[tuple[Group, ...]]:
    """Return groupings over several kinds of cards: each engine on one kind, all in one dtype."""
    parts = [gpus for gpus in kinds(request.visible) if not gpus[0].mig]
    if len(parts) < 2:
        return []
    if "dtype" not in request.engine_options:
        first = dtype_for(request.model, parts[0])[0]
        parts = [gpus for gpus in parts if dtype_for(request.model, gpus)[0] == first]
    tps = [_tps(request, gpus, engine) for gpus in parts]
    return mixed_groupings(request.machine, parts, tps, request.replicas)


def _unequal_groupings(request: ResolvedRequest, engine: Engine) -> Iterator[tuple[Group, ...]]:
    """Yield groups of unequal cards, if ``tp`` was given.

    A model that `unsplittable` names gets no group of unequal capabilities.
    """
    gpus, tp = [gpu for gpu in request.visible if not gpu.mig], request.tp
    if tp is None or engine.tp_problem(request.model, tp) or unsplittable(request):
        return
    for replicas in _replicas(request, len(gpus) // tp):
        yield from ways(request.machine, gpus, tp, replicas)


def unsplittable(request: ResolvedRequest) -> str:
    """Return why no engine is split over all the visible GPUs, in words; empty if one may be.

    Quantised weights have different formats on some cards, but an account knows one format per
    group.
    """
    whole = {gpu.compute_capability for gpu in request.visible if not gpu.mig}
    packed = request.model.quantization
    if packed is None or len(whole) < 2:
        return ""
    return f"{packed.bits}-bit weights need cards of one generation"


def _tps(request: ResolvedRequest, gpus: Sequence[Gpu], engine: Engine) -> list[int]:
    """Return the values of ``tp`` that cards of one kind can run; only 1 on MIG instances.

    NCCL cannot connect MIG instances.
    """
    most = 1 if gpus[0].mig else len(gpus)
    degrees = range(1, min(most, _LARGEST_TP) + 1) if request.tp is None else (request.tp,)
    return [tp for tp in degrees if tp <= most and not engine.tp_problem(request.model, tp)]


def _replicas(request: ResolvedRequest, most: int) -> Sequence[int]:
    """Return the numbers of replicas to try, up to ``most``."""
    return [n for n in range(1, most + 1) if request.replicas in (None, n)]


def check_gpus(request: ResolvedRequest) -> None:
    """Check that there are as many GPUs as were asked for.

    MIG slices do not count if a model is split over several GPUs.

    Raises:
        UsageError: there are fewer GPUs.
    """
    given = [f"`--{name} {n}`" for name in ("tp", "replicas") if (n := getattr(request, name))]
    tp, visible = request.tp or 1, request.visible
    need, whole = tp * (request.replicas or 1), sum(not gpu.mig for gpu in visible)
    hint = "let turbofit choose `--tp` and `--replicas`"
    if need > len(visible):
        are = "is" if len(visible) == 1 else "are"
        problem = f"{' and '.join(given)}: {need} GPUs are needed, {len(visible)} {are} visible"
        hint += f", or name a machine of {need} GPUs, as `--on {need}xrtx3090`"
    elif tp > 1 and need > whole:
        problem = (
            f"`--tp {tp}` would split a model over MIG slices: a CUDA process sees one slice, and"
            f" NCCL joins none; of the GPUs {whole} are whole. `--replicas` runs an engine on each"
            " slice"
        )
    else:
        return
    raise UsageError(problem, hint=hint)


def check_tp(request: ResolvedRequest, engine: Engine) -> None:
    """Raise a `UsageError` if the engine cannot split the model over the given number of GPUs."""
    if problem := engine.tp_problem(request.model, request.tp or 1):
        raise UsageError(
            f"`--tp {request.tp or 1}` is not possible for {request.model.name}: {problem}",
            hint="let turbofit choose `--tp` and `--replicas`",
        )


def kinds(gpus: Sequence[Gpu]) -> list[tuple[Gpu, ...]]:
    """Divide the GPUs into kinds of equal cards, as a tensor-parallel group needs them."""
    facts = ((gpu.name, gpu.total, gpu.compute_capability, gpu.limit) for gpu in gpus)
    alike = grouped(zip(facts, gpus, strict=True))
    return [tuple(group) for group in alike.values()]


def ways(
    machine: Machine, gpus: Sequence[Gpu], tp: int, replicas: int
) -> Iterator[tuple[Group, ...]]:
    """Yield ways to form ``replicas`` groups of ``tp`` GPUs; all differ in memory or links.

    In each group, the card with the most free memory comes first: it stages the weights.
    """
    if tp * replicas > len(gpus):
        return
    for way in _distinct(machine, tuple(gpus), tp, replicas):
        ordered = [
            sorted(group, key=lambda gpu: (known(gpu.used, 0) - gpu.usable, gpu.index))
            for group in way
        ]
        yield tuple(tuple(gpu.index for gpu in group) for group in ordered)


def _distinct(
    machine: Machine, gpus: tuple[Gpu, ...], tp: int, replicas: int
) -> Iterable[tuple[tuple[Gpu, ...], ...]]:
    """Return ways to form groups; of ways with equal memory and equal links, only the first.

    For many GPUs, only the way of `_in_order` is returned.
    """
    if len(gpus) > _EXHAUSTIVE:
        return [_in_order(machine, gpus, tp, replicas)]

    @cache
    def signature(*indices: int) -> tuple[object, ...]:
        group = [machine.gpu(index) for index in indices]
        cards = sorted(
            (known(g.total, 0), known(g.reserved, 0), known(g.used, 0), g.ours) for g in group
        )
        return tuple(cards), group_class(machine, group), reduce_class(machine, group)

    distinct: dict[tuple[object, ...], tuple[tuple[Gpu, ...], ...]] = {}
    for way in _partitions(gpus, tp, replicas):
        signatures = (signature(*(gpu.index for gpu in group)) for group in way)
        distinct.setdefault(tuple(sorted(signatures)), way)
    return distinct.values()


def mixed_groupings(
    machine: Machine,
    parts: Sequence[Sequence[Gpu]],
    tps: Sequence[Sequence[int]],
    replicas: int | None = None,
) -> list[tuple[Group, ...]]:
    """Return groupings of two or more kinds of card, where each group has one kind.

    ``parts`` has the cards of each kind, and ``tps`` the values of ``tp`` for each kind. Each kind
    forms as many groups as its cards allow. Groupings with all kinds and small ``tp`` come first;
    only a limited number is returned. ``replicas`` is the number of groups; None: any.
    """
    by_kind = [
        [way for tp in degrees for way in islice(ways(machine, gpus, tp, len(gpus) // tp), _MIXED)]
        for gpus, degrees in zip(parts, tps, strict=True)
    ]
    by_kind = [found for found in by_kind if found]
    subsets = (some for k in range(len(by_kind), 1, -1) for some in combinations(by_kind, k))
    chosen_kinds = list(islice(subsets, _MOST_MIXED))
    most = max(2, _MOST_MIXED // max(1, len(chosen_kinds)))
    mixed: list[tuple[Group, ...]] = []
    for kinds_ways in chosen_kinds:
        places = product(*(range(len(found)) for found in kinds_ways))
        joined = (
            tuple(chain(*(found[place] for found, place in zip(kinds_ways, chosen, strict=True))))
            for chosen in sorted(places, key=sum)  # combinations of early ways come first
        )
        mixed += islice((way for way in joined if replicas in (None, len(way))), most)
    return mixed[: 2 * _MOST_MIXED]


def like_groups(machine: Machine, groups: Sequence[Group]) -> tuple[tuple[Group, ...], ...]:
    """Divide the groups into sets of equal groups, the set with the freest cards first.

    Two groups are equal if their cards in each position are equal; a small difference in used
    memory does not matter. Links are ignored.
    """

    def cards(group: Group) -> list[tuple[int, str, int, int, int]]:
        gpus = [machine.gpu(index) for index in group]
        return [
            (known(g.used, 0), g.name, known(g.total, 0), known(g.reserved, 0), g.ours)
            for g in gpus
        ]

    by_group = {group: cards(group) for group in groups}

    def alike(group: Group, other: Group) -> bool:
        pairs = list(zip(by_group[group], by_group[other], strict=False))
        equal = all(a[1:] == b[1:] and abs(a[0] - b[0]) < ALIKE for a, b in pairs)
        return len(group) == len(other) and equal

    freest_first = sorted(groups, key=lambda group: (*by_group[group], group))
    return tuple(tuple(sorted(members)) for members in sets_of(freest_first, alike))


def _partitions(
    gpus: tuple[Gpu, ...], tp: int, replicas: int
) -> Iterator[tuple[tuple[Gpu, ...], ...]]:
    """Yield all unordered choices of groups, those with the smallest indices first."""
    if replicas == 0:
        yield ()
        return
    for start in range(len(gpus) - tp * replicas + 1):
        first, rest = gpus[start], gpus[start + 1 :]
        for others in combinations(rest, tp - 1):
            left = tuple(gpu for gpu in rest if gpu not in others)
            for more in _partitions(left, tp, replicas - 1):
                yield ((first, *others), *more)


def _in_order(
    machine: Machine, gpus: Sequence[Gpu], tp: int, replicas: int
) -> tuple[tuple[Gpu, ...], ...]:
    """Form groups one by one: start with the freest card, and add the card with the best link."""
    left = sorted(gpus, key=lambda gpu: (known(gpu.used, 0), gpu.index))
    groups = []
    for _ in range(replicas):
        group = [left.pop(0)]
        while len(group) < tp:
            best = max(left, key=lambda gpu: group_class(machine, [*group, gpu]))
            left.remove(best)
            group.append(best)
        groups.append(tuple(group))
    return tuple(groups)
