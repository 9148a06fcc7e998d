"""Sizes one shape: the context, the batch and the cache ratio that its cache allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from operator import ge
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.plan import Settings
from turbofit.core.struct import known
from turbofit.core.units import bisect, grouped, last_good, round_up
from turbofit.memory.account import (
    NO_IMAGES,
    RATIO_STEPS,
    Account,
    Engine,
    EngineLaunch,
    VisionLoad,
)
from turbofit.memory.known_bad import KnownProblem, largest_batch
from turbofit.planning.resolved_request import (
    ResolvedRequest,
    launch_of,
    photographs,
    vision_load_of,
)
from turbofit.planning.search.shapes import Evaluation, Shape, like_groups, shape_settings
from turbofit.planning.speed import (
    GroupRates,
    Speed,
    counted_tokens,
    group_class,
    group_rates,
    group_speed,
    nvlink_bandwidth,
    reduce_class,
    request_tokens,
)
from turbofit.planning.throughput import surety_of_speed

V = TypeVar("V")
Groups = tuple[tuple[int, ...], ...]

#: The search tries only contexts that are multiples of this.
CONTEXT_STEP: Final = 64
#: A context is rounded down to a multiple of this, unless too much would be lost.
ROUND_CONTEXT: Final = 1024
#: The share of its length that a rounded context must keep.
_ROUND_KEEPS: Final = 0.95
#: The tokens of text and answer that a context must hold in addition to the images.
MIN_TEXT_TOKENS: Final = 1024
#: A context that is too short for `MIN_TEXT_TOKENS` reserves an eighth of its tokens for text.
_TEXT_SHARE: Final = 8
#: A context, in tokens, that is enough for most requests.
_ENOUGH_CONTEXT: Final = 32768
#: The share of the best rate (requests a second) that is enough; a higher rate may not be worth its
#: memory.
_NEARLY_ALL: Final = 0.99
#: With the goal of context, a batch must keep this share of the tokens.
_TOKENS_KEPT: Final = 0.99


#: A function that returns the problem of a launch, or None if there is none.
Ask = Callable[[EngineLaunch], "str | KnownProblem | None"]


class SearchState:
    """The state that all shapes of one search share: the request, and cached values."""

    def __init__(
        self, request: ResolvedRequest, engine: Engine, wished: VisionLoad | None = None
    ) -> None:
        self.request, self.engine = request, engine
        #: The load of the workload's images under the image limit of this search.
        self.requested_load = vision_load_of(request, request.requested_image_limit)
        #: The load that was wished, if this search serves a lower image limit.
        self.wished_load = wished or self.requested_load
        #: True if the last shape's cache was too small for the shortest context; the next shape
        #: then tries that context first.
        self.too_small = False
        self._answers: dict[tuple[object, ...], Any] = {}

    def once(self, key: tuple[object, ...], answer: Callable[[], V]) -> V:
        """Return the answer for a key, computed only once; keys begin with a question's name."""
        if key not in self._answers:
            self._answers[key] = answer()
        found: V = self._answers[key]
        return found

    def load_of(self, image_limit: int | None, units_per_forward: int | None) -> VisionLoad:
        """Return the load of images under a limit, with as many vision units in one forward."""
        return self.once(
            ("load", image_limit, units_per_forward),
            lambda: replace(
                vision_load_of(self.request, image_limit), units_per_forward=units_per_forward
            ),
        )

    def gpus_of(self, groups: Groups) -> list[tuple[Gpu, ...]]:
        machine = self.request.machine
        return self.once(("gpus", groups), lambda: [tuple(map(machine.gpu, g)) for g in groups])

    def alike(self, groups: Groups) -> tuple[Groups, ...]:
        """Return the groups as sets of equal ones."""
        return self.once(("alike", groups), lambda: like_groups(self.request.machine, groups))

    def distinct(self, groups: Groups) -> list[tuple[Gpu, ...]]:
        """Return the groups that differ in account or speed; of equal groups only the first one."""

        def distinct() -> list[tuple[Gpu, ...]]:
            alike = grouped((self.key_of(gpus), gpus) for gpus in self.gpus_of(groups))
            return [gpus for gpus, *_ in alike.values()]

        return self.once(("distinct", groups), distinct)

    def kinds(self, groups: Groups) -> frozenset[object]:
        """Return the kinds of the groups: more groups of the same kinds serve the same images."""
        return frozenset(map(self.key_of, self.gpus_of(groups)))

    def key_of(self, gpus: tuple[Gpu, ...]) -> tuple[object, ...]:
        """Return a key that is equal for groups with equal accounts and speeds.

        The key has the GPUs' indices only if the group's cards are unequal.
        """
        machine, indices = self.request.machine, tuple(gpu.index for gpu in gpus)

        def key() -> tuple[object, ...]:
            first, rest = gpus[0], gpus[1:]
            unequal = len({(gpu.name, gpu.total, gpu.limit) for gpu in gpus}) > 1
            fullest = max((known(gpu.reserved, 0) + known(gpu.used, 0) for gpu in rest), default=0)
            links = group_class(machine, gpus), nvlink_bandwidth(machine, gpus)
            of_first = first.name, first.total, first.reserved, first.used, first.limit
            reduces = reduce_class(machine, gpus)
            return (*of_first, fullest, *links, reduces, indices if unequal else ())

        return self.once(("key", indices), key)


class Sizer:
    """Sizes one shape: computes contexts, ratios, missing bytes and speeds of its groups."""

    def __init__(self, state: SearchState, shape: Shape) -> None:
        self.state, self.request, self.engine = state, state.request, state.engine
        self.shape = shape
        self.vision_load = state.load_of(shape.image_limit, shape.units_per_forward)
        self.groups, self.distinct = state.gpus_of(shape.groups), state.distinct(shape.groups)
        self._fixed_ratio = self.request.engine_options.get("cache_max_entry_count")

    def with_batch(self, batch: int) -> Sizer:
        other = copy(self)
        other.shape = replace(self.shape, at_once=float(batch))
        return other

    def safe(self) -> Sizer:
        """Return the sizer with a batch that the engine survives, unless a batch is given."""
        if "max_batch_size" in self.request.engine_options:
            return self
        batch = self.shape.requests(self.request.workload.concurrency)
        limit = self.largest_batch(
            shape_settings(self.request, self.shape, most_context(self.request))
        )
        return self if limit is None or batch <= limit else self.with_batch(limit)

    def evaluation(self, session_len: int) -> Evaluation:
        """Evaluate the shape with this context: its cache ratio, KV tokens and missing bytes.

        The evaluation has no forecast of speed.
        """
        settings = shape_settings(self.request, self.shape, session_len)
        key = "sized", settings, self.vision_load, self.shape.groups
        ratio, kv_tokens, short = self.state.once(key, lambda: self._cache(settings))
        if ratio is not None:
            settings = replace(settings, cache_max_entry_count=ratio)
        return Evaluation(
            engine=self.engine.name,
            shape=self.shape,
            settings=settings,
            vision_load=self.vision_load,
            kv_tokens=kv_tokens,
            fits=not short,
            short=short,
        )

    def _cache(self, settings: Settings) -> tuple[float | None, int, int]:
        """Return the cache ratio, the KV tokens and the missing bytes with these settings."""
        accounts = [self._account(settings, gpus) for gpus in self.distinct]
        ratio = self.ratio(accounts)
        if ratio is not None and self.request.least:
            ratio = self._least_ratio(accounts, ratio)
        kv_tokens = 0 if ratio is None else min(account.tokens_at(ratio) for account in accounts)
        return ratio, kv_tokens, self._short(accounts, ratio, kv_tokens)

    def lacking(self, kv_tokens: int, session_len: int, wanted: int) -> int:
        """Return the bytes that a cache of ``kv_tokens`` lacks to hold ``wanted`` requests."""
        account, size = self.accounts(session_len)[0], counted_tokens(self.vision_load, session_len)
        tokens = wanted * round_up(size, account.settings.cache_block_seq_len)
        return max(0, tokens - kv_tokens) * account.bytes_per_token

    def accounts(self, session_len: int) -> list[Account]:
        """Return one account for each set of equal groups, made for the GPUs of its first group."""
        settings = shape_settings(self.request, self.shape, session_len)
        return [self._account(settings, gpus) for gpus in self.distinct]

    def largest_batch(self, settings: Settings) -> int | None:
        """Return the largest batch that the engines of all groups survive; None without a limit."""
        name, version = self.engine.name, self.engine.version

        def largest() -> int | None:
            launches = (
                launch_of(self.request, settings, g, self.vision_load) for g in self.distinct
            )
            limits = [largest_batch(launch, name, version) for launch in launches]
            return min((limit for limit in limits if limit is not None), default=None)

        kinds = tuple(map(self.state.key_of, self.distinct))
        return self.state.once(("batch", settings.tp, kinds), largest)

    def speed(
        self,
        settings: Settings,
        gpus: tuple[Gpu, ...],
        kv_tokens: int,
        at_once: float,
        *,
        plain: bool = False,
        images: VisionLoad | None = None,
    ) -> Speed:
        """Forecast one group's speed with ``at_once`` requests.

        ``plain``: as if the vision tower's attention took no time. ``images``: of each request;
        None: the workload's.
        """
        request, state = self.request, self.state
        sent = state.requested_load if images is None else images

        def rates() -> GroupRates:
            return group_rates(request.model, settings, request.machine, gpus, self.engine)

        def forecast() -> Speed:
            # A search varies many settings, but only the GPUs, `tp` and `dtype` determine the
            # rates.
            key = settings.tp, settings.dtype, tuple(gpu.index for gpu in gpus)
            shown = state.once(("rates", *key), rates)
            group = state.once(("plain rates", *key), lambda: shown.plain) if plain else shown
            waiting = replace(sent, units_per_forward=units)
            return group_speed(group, settings, waiting, kv_tokens, at_once)

        units = self.shape.units_per_forward
        key = "speed", settings, state.key_of(gpus), kv_tokens, at_once, units, plain, sent
        return state.once(key, forecast)

    def contexts(self) -> tuple[int, int]:
        """Return the shortest and the longest context to try; a given context is both."""
        longest = longest_context(self.request)
        if self.request.context_given:
            return longest, longest
        if self.shape.promised is not None:
            longest = min(longest, self.shape.promised)
        return min(shortest_context(self.vision_load), longest), longest

    def session_len(self) -> int:
        """Return the context in tokens: the user's, or as much of `longest_context` as is held."""
        low, longest = self.contexts()
        if low == longest:
            return low
        if self.state.too_small and self._tokens_held(low) < low:
            return low
        held = self._tokens_held(longest)
        self.state.too_small = held < low and self._tokens_held(low) < low
        if held >= longest or self.state.too_small:
            return min(longest, max(low, held))
        # With a shorter context the cache holds at least as many tokens, which bounds the search.
        low = max(low, held // CONTEXT_STEP * CONTEXT_STEP)
        longest = min(longest, self._tokens_held(low) + 1)
        steps = low // CONTEXT_STEP, -(-longest // CONTEXT_STEP)

        def left(steps: int) -> int:
            return self._tokens_held(CONTEXT_STEP * steps) - CONTEXT_STEP * steps

        low = CONTEXT_STEP * last_good(left, *steps)
        rounded = low // ROUND_CONTEXT * ROUND_CONTEXT
        # Rounding must cost little: 3,072 of 4,032 would lose a quarter.
        cheap = rounded >= low * _ROUND_KEEPS and rounded >= shortest_context(self.vision_load)
        return rounded if cheap else low

    def ratio(self, accounts: Sequence[Account]) -> float | None:
        """Return the largest cache ratio with which every group fits, or the user's own ratio.

        The largest ratio is bounded by the caps that rehearsals found. Returns None if a group fits
        with no ratio.
        """
        if isinstance(self._fixed_ratio, int | float):
            return float(self._fixed_ratio)
        best = [self.state.once(("ratio", account), account.best_ratio) for account in accounts]
        ratios = [ratio for ratio in best if ratio is not None]
        if len(ratios) < len(accounts):
            return None
        caps = self.request.ratio_caps
        left = (caps[index] for group in self.shape.groups for index in group if index in caps)
        return min(1.0, *ratios, *left)

    def _least_ratio(self, accounts: Sequence[Account], most: float) -> float:
        """Return the smallest ratio whose cache holds a whole context for each request of a batch.

        The result is at most ``most``. If the user gave the ratio, the result is ``most``.
        """
        if self._fixed_ratio is not None:
            return most
        settings = accounts[0].settings
        wanted = max(settings.max_batch_size * settings.session_len, self.needed_tokens())

        def too_small(step: int) -> bool:
            ratio = step / RATIO_STEPS
            return any(
                account.tokens_at(ratio) < wanted or account.cache_shortfall_at(ratio)
                for account in accounts
            )

        return bisect(too_small, 0, round(most * RATIO_STEPS))[1] / RATIO_STEPS

    def footprint(self, settings: Settings) -> int:
        """Return the most bytes in use by the engines of all groups, on all of their GPUs."""
        accounts = [self._account(settings, gpus) for gpus in self.groups]
        return sum(sum(account.taken_at(account.ratio)) for account in accounts)

    def _short(self, accounts: Sequence[Account], ratio: float | None, kv_tokens: int) -> int:
        """Return the bytes missing on the tightest GPU; 0 if the shape serves."""
        if ratio is None:
            return max(account.missing_without_ratio() for account in accounts)
        if missing := max(account.missing_at(ratio) for account in accounts):
            return missing
        cache_shortfall = max(account.cache_shortfall_at(ratio) for account in accounts)
        if cache_shortfall:
            return cache_shortfall
        tokens = max(
            0, self.needed_tokens() - kv_tokens, excess_tokens(self.request, self.vision_load)
        )
        return tokens * accounts[0].bytes_per_token

    def needed_tokens(self) -> int:
        """Return the tokens that the cache must hold: the given context, or else one request."""
        if self.request.workload.context is not None:
            return self.request.workload.context
        longest = self.request.model.text.max_position_embeddings
        return min(shortest_context(self.vision_load), longest, most_context(self.request))

    def _tokens_held(self, session_len: int) -> int:
        """Return the tokens of the cache with this context; 0 if the engine does not start."""
        accounts = self.accounts(session_len)
        ratio = self.ratio(accounts)
        if ratio is None or any(account.cache_shortfall_at(ratio) for account in accounts):
            return 0
        return min(account.tokens_at(ratio) for account in accounts)

    def _account(self, settings: Settings, gpus: tuple[Gpu, ...]) -> Account:
        request, load = self.request, self.vision_load
        key = "account", settings, load, self.state.key_of(gpus)
        return self.state.once(
            key, lambda: self.engine.account(launch_of(request, settings, gpus, load))
        )


def shortest_context(vision_load: VisionLoad) -> int:
    """Return the least ``session_len`` with which the workload's request can be served."""
    return round_up(vision_load.tokens_per_request + MIN_TEXT_TOKENS, CONTEXT_STEP)


def most_context(request: ResolvedRequest) -> int:
    """Return the given context in tokens, or else the model's own."""
    fixed = request.engine_options.get("session_len", request.workload.context)
    return fixed if isinstance(fixed, int) else request.model.text.max_position_embeddings


def longest_context(request: ResolvedRequest) -> int:
    """Return the longest context to promise: the user's, or the model's own up to 32,768.

    If images need more than 32,768 tokens, the context is longer. Few requests need more, and a
    longer context lets more images share TurboMind's forward, which takes memory. With the goal
    ``context`` the model's own context is returned; for the least footprint, the tokens of one
    request.
    """
    most = most_context(request)
    if request.workload.goal == "context" or request.context_given:
        return most
    need = shortest_context(vision_load_of(request, request.requested_image_limit))
    return min(most, need if request.least else max(_ENOUGH_CONTEXT, need))


def excess_tokens(request: ResolvedRequest, vision_load: VisionLoad) -> int:
    """Return by how many tokens a request's images and some text exceed the longest context.

    LMDeploy refuses such prompts.
    """
    if not vision_load.units_per_image:
        return 0
    context = most_context(request)
    text = min(MIN_TEXT_TOKENS, context // _TEXT_SHARE)
    return max(0, vision_load.tokens_per_request + text - context)


def best_batch(sizer: Sizer, session_len: int) -> tuple[int, bool]:
    """Return the batch of one engine, and whether more memory would allow a larger batch.

    The user's own batch is kept. Otherwise the batch is the smallest with nearly the best forecast,
    or the largest that memory allows without a shorter ``session_len``. The forecast leaves out the
    time of the tower's attention: a worst image may need seconds in the tower, and a larger batch
    gains little for such an image, but it saves smaller images and texts a wait.
    """
    fixed = sizer.request.engine_options.get("max_batch_size")
    if isinstance(fixed, int):
        return fixed, False
    alone = sizer.evaluation(session_len)
    if not alone.fits:
        return 1, True
    usual = sizer.state.requested_load.usual  # other lengths never make the batch smaller
    need = request_tokens(usual)
    default = _most_rows(sizer, alone.settings)
    most = min(default, max(1, alone.settings.requests_in(alone.kv_tokens, need)))
    kept = alone.kv_tokens * _TOKENS_KEPT if sizer.request.workload.goal == "context" else 0
    least = max(kept, min(session_len, alone.kv_tokens))  # tokens that a larger batch must leave

    settings = shape_settings(sizer.request, sizer.shape, session_len)

    def rate(batch: int) -> float:
        rows = replace(settings, max_batch_size=batch)
        speeds = [
            sizer.speed(rows, gpus, alone.kv_tokens, batch, plain=True, images=usual)
            for gpus in sizer.distinct
        ]
        return sum(speed.requests_per_second for speed in speeds)

    def left(batch: int) -> float:
        """Return for how many more requests a batch leaves room; negative if it is too large."""
        sized = sizer.with_batch(batch).evaluation(session_len)
        held = sized.settings.requests_in(sized.kv_tokens, need)
        return min(held - batch, (sized.kv_tokens - least) / need) if sized.fits else -1.0

    wanted = _fastest(rate, most)[0]
    chosen = last_good(left, 1, wanted + 1)
    # The cache bounds the batch if a larger batch, up to LMDeploy's default, might be faster.
    bound = most < default and wanted == most
    return chosen, bound or chosen < wanted


def _most_rows(sizer: Sizer, settings: Settings) -> int:
    """Return LMDeploy's default batch on these cards; a larger batch is never chosen."""
    sizes = [sizer.engine.defaults(gpus[0].name)["max_batch_size"] for gpus in sizer.groups]
    default = min(size for size in sizes if isinstance(size, int))
    return min(default, sizer.largest_batch(settings) or default)


def client_batch(sizer: Sizer, sized: Evaluation) -> int:
    """Return the batch of one engine for the images and texts that clients really send.

    ``sized`` has the batch for the largest images. Rows for smaller requests are added as long as
    they take no byte, and change neither the cache nor the units of a forward.
    """
    load, least = sized.vision_load, sized.settings.max_batch_size
    rule, limit = sizer.request.model.image_rule, sizer.shape.image_limit
    if rule is None or limit is None or not load.units_per_image:
        return least
    wanted = _wanted_rows(sizer, sized, photographs(rule, limit, load.usual))

    def costs_nothing(batch: int) -> bool:
        return _takes_no_more(sizer, sizer.with_batch(batch), sized)

    if wanted <= least or costs_nothing(wanted):
        return max(least, wanted)
    return bisect(costs_nothing, least, wanted)[0]


def _wanted_rows(sizer: Sizer, sized: Evaluation, photograph: VisionLoad) -> int:
    """Return the smallest batch with nearly the best forecast of photographs and of text.

    Texts gain by a batch that is larger than photographs need, up to a batch in which evictions
    would make photographs slower. If the speed is not known, the batch is the number of photographs
    that the cache holds.
    """
    settings, tokens = sized.settings, sized.kv_tokens
    default = _most_rows(sizer, settings)
    model, gpus = sizer.request.model, [gpu for group in sizer.groups for gpu in group]

    def most(images: VisionLoad) -> int:
        size = min(request_tokens(images), settings.session_len)
        return min(default, max(1, settings.requests_in(tokens, size)))

    def rate(batch: int, images: VisionLoad) -> float:
        rows = replace(settings, max_batch_size=batch)
        speeds = (sizer.speed(rows, it, tokens, batch, images=images) for it in sizer.distinct)
        return sum(speed.requests_per_second for speed in speeds)

    if not surety_of_speed(model, sizer.engine.name, gpus, images=True).known:
        return most(photograph)
    least, enough = _fastest(lambda batch: rate(batch, photograph), most(photograph))
    of_text = _fastest(lambda batch: rate(batch, NO_IMAGES), most(NO_IMAGES))[0]
    return bisect(lambda batch: rate(batch, photograph) >= enough, least, of_text + 1)[0]


def _takes_no_more(sizer: Sizer, larger: Sizer, sized: Evaluation) -> bool:
    """Return whether a larger batch takes no more memory, and leaves the cache and units as is."""
    session_len = sized.settings.session_len
    more = larger.evaluation(session_len)
    ratio = sized.settings.cache_max_entry_count
    if (more.settings.cache_max_entry_count, more.kv_tokens) != (ratio, sized.kv_tokens):
        return False

    pairs = zip(sizer.accounts(session_len), larger.accounts(session_len), strict=True)
    return more.fits and all(
        now.units_per_forward == then.units_per_forward
        and all(map(ge, now.taken_at(ratio), then.taken_at(ratio)))
        for now, then in pairs
    )


def _fastest(rate: Callable[[int], float], most: int) -> tuple[int, float]:
    """Return the smallest batch, up to ``most``, of nearly the best rate, and the least such rate.

    The rate grows up to a single maximum; powers of two and ``most`` are tried.
    """
    tried = [1 << k for k in range(most.bit_length()) if 1 << k < most] + [most]
    best = len(tried) - 1
    while best and rate(tried[best - 1]) > rate(tried[best]):
        best -= 1
    enough = rate(tried[best]) * _NEARLY_ALL
    first = bisect(lambda place: rate(tried[place]) < enough, -1, best)[1]
    low = tried[first - 1] if first else 0
    return bisect(lambda batch: rate(batch) < enough, low, tried[first])[1], enough


def held_by(sized: Evaluation) -> int:
    """Return how many requests of `counted_tokens` an engine runs at once; 0 if it does not fit."""
    settings = sized.settings
    size = counted_tokens(sized.vision_load, settings.session_len)
    held = settings.requests_in(sized.kv_tokens, size)
    return min(settings.max_batch_size, held) if sized.fits else 0


def most_held(sizer: Sizer, wanted: int) -> int:
    """Return the most requests below ``wanted`` that one engine holds at once; 0 if none."""

    def holds(batch: int) -> bool:
        some = sizer.with_batch(batch)
        return held_by(some.evaluation(some.session_len())) >= batch

    return bisect(holds, 1, wanted)[0] if holds(1) else 0
