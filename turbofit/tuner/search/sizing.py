"""The context and the ratio of one shape: as much as its cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct, known
from turbofit.memory.account import RATIO_STEPS, Account
from turbofit.memory.engine import Engine
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.resolved_request import ResolvedRequest, launch_of
from turbofit.tuner.search.context import (
    ROUND_CONTEXT,
    excess_tokens,
    longest_context,
    longest_held,
    shortest_context,
)
from turbofit.tuner.search.shape import Shape, shape_settings
from turbofit.tuner.speed.all_reduce import reduce_class
from turbofit.tuner.speed.links import LinkClass, group_class, nvlink_bandwidth
from turbofit.tuner.speed.throughput import (
    GroupRates,
    Speed,
    counted_tokens,
    group_rates,
    group_speed,
)

__all__ = ["Memo", "Outcome", "Sizer"]

_ROUND_KEEPS = 0.95


class Memo:
    """Accounts and speeds of one search, so that a group met in many groupings is evaluated once.

    ``sized`` are contexts and batches of shapes that differ in nothing but how often their groups
    are there. ``too_small``: the last shape's cache did not hold the shortest context, which is
    looked at first then.

    Equal cards behind equal links are one group here whatever their indices: the first card and the
    fullest of the others decide all that a search asks of an account.
    """

    def __init__(self) -> None:
        self.accounts: dict[tuple[object, ...], Account] = {}
        self.speeds: dict[tuple[object, ...], Speed] = {}
        self.rates: dict[tuple[object, ...], GroupRates] = {}
        self.links: dict[tuple[int, ...], LinkClass] = {}
        self.keys: dict[tuple[int, ...], tuple[object, ...]] = {}
        self.sized: dict[tuple[object, ...], tuple[int, int | None, bool]] = {}
        self.too_small = False

    def link(self, request: ResolvedRequest, gpus: Sequence[Gpu]) -> LinkClass:
        """The group's link class."""
        key = tuple(gpu.index for gpu in gpus)
        if key not in self.links:
            self.links[key] = group_class(request.machine, gpus)
        return self.links[key]


class Outcome(Struct):
    """What a shape's cache holds; ``short`` are bytes that are missing, 0 where it serves."""

    ratio: float | None
    kv_tokens: int
    short: int


class Sizer:
    """Finds the context and the ratio of one shape."""

    def __init__(
        self,
        request: ResolvedRequest,
        shape: Shape,
        dtype: str,
        vision_load: VisionLoad,
        engine: Engine,
        memo: Memo,
    ) -> None:
        self.request = request
        self.memo = memo
        self.shape = shape
        self.dtype = dtype
        self.vision_load = replace(vision_load, units_per_forward=shape.units_per_forward)
        self.engine = engine
        self.groups: list[tuple[Gpu, ...]] = [
            tuple(request.machine.gpu(index) for index in group) for group in shape.groups
        ]
        self.fixed_ratio = request.fixed.get("cache_max_entry_count")

    @property
    def key(self) -> tuple[object, ...]:
        """What the context and the best batch depend on: groups that are alike count once."""
        shape, keys = self.shape, tuple(map(self._key, self.distinct))
        at_once = shape.requests(self.request.workload.concurrency)
        return (replace(shape, groups=(), at_once=at_once), self.dtype, self.vision_load, keys)

    def with_batch(self, batch: int) -> Sizer:
        """The same with so many requests at once in each group."""
        other = copy(self)
        other.shape = replace(self.shape, at_once=float(batch))
        return other

    @property
    def most_batch(self) -> int:
        """LMDeploy's default ``max_batch_size`` on these cards; no larger one is chosen."""
        sizes = [self.engine.defaults(gpus[0].name)["max_batch_size"] for gpus in self.groups]
        return min(size for size in sizes if isinstance(size, int))

    def settings(self, session_len: int) -> Settings:
        """The engine's options with this context, before the ratio is known."""
        return shape_settings(self.request, self.shape, session_len, self.dtype)

    def outcome(self, session_len: int) -> Outcome:
        """What the cache holds with this context."""
        accounts = self.accounts(session_len)
        ratio = self.ratio(accounts)
        if ratio is not None and self.request.least:
            ratio = self._least_ratio(accounts, ratio)
        kv_tokens = 0 if ratio is None else min(account.tokens_at(ratio) for account in accounts)
        short = self._short(accounts, ratio, kv_tokens)
        return Outcome(ratio=ratio, kv_tokens=kv_tokens, short=short)

    def held(self, outcome: Outcome, session_len: int) -> int:
        """Requests of the size that verdicts count by which one engine runs and holds at once."""
        if outcome.short:
            return 0
        size = counted_tokens(self.vision_load, session_len)
        return min(self.settings(session_len).max_batch_size, outcome.kv_tokens // size)

    def lacking(self, outcome: Outcome, session_len: int, wanted: int) -> int:
        """Bytes of a GPU's cache that are missing for so many requests of that size."""
        tokens = wanted * counted_tokens(self.vision_load, session_len) - outcome.kv_tokens
        return max(0, tokens) * self.accounts(session_len)[0].bytes_per_token

    def accounts(self, session_len: int) -> list[Account]:
        """The accounts of the groups that differ; their indices may be another equal group's."""
        settings = self.settings(session_len)
        return [self._remembered(settings, self._key(gpus), gpus) for gpus in self.distinct]

    def speed(
        self,
        settings: Settings,
        gpus: tuple[Gpu, ...],
        requested_load: VisionLoad,
        kv_tokens: int,
        at_once: float | None = None,
    ) -> Speed:
        """The forecast of one group; ``at_once`` None: with the requests that the shape counts."""
        if at_once is None:
            at_once = self.shape.requests(self.request.workload.concurrency)
        key = (settings, self._key(gpus), requested_load, kv_tokens, at_once)
        if key not in self.memo.speeds:
            self.memo.speeds[key] = group_speed(
                self._rates(settings, gpus), settings, requested_load, kv_tokens, at_once
            )
        speed = self.memo.speeds[key]
        return speed if self.shape.units_per_forward is None else speed.queued()

    def _rates(self, settings: Settings, gpus: tuple[Gpu, ...]) -> GroupRates:
        """What a group sustains: of what a search varies, its GPUs, ``tp`` and the type decide."""
        key = (settings.tp, settings.dtype, *(gpu.index for gpu in gpus))
        if key not in self.memo.rates:
            self.memo.rates[key] = group_rates(
                self.request.model, settings, self.request.machine, gpus, self.engine
            )
        return self.memo.rates[key]

    def session_len(self) -> int:
        """The context: the user's, or the model's own lowered to what the cache holds."""
        fixed = self.request.fixed.get("session_len", self.request.workload.context)
        if isinstance(fixed, int):
            return fixed
        longest = longest_context(self.request)
        if self.shape.promised is not None:
            longest = min(longest, self.shape.promised)
        low = min(shortest_context(self.vision_load), longest)
        if self.memo.too_small and not self._holds(low):
            return low
        if self._holds(longest):
            self.memo.too_small = False
            return longest
        self.memo.too_small = not self._holds(low)
        if self.memo.too_small:
            return low
        low = longest_held(self._held, low, longest)
        rounded = low // ROUND_CONTEXT * ROUND_CONTEXT
        # A round number where it costs little: 3,072 of 4,032 would be a quarter.
        cheap = rounded >= low * _ROUND_KEEPS and rounded >= shortest_context(self.vision_load)
        return rounded if cheap else low

    def ratio(self, accounts: Sequence[Account]) -> float | None:
        """The largest ratio that fits every group, or the user's own."""
        if isinstance(self.fixed_ratio, int | float):
            return float(self.fixed_ratio)
        ratios = [account.best_ratio() for account in accounts]
        found = [ratio for ratio in ratios if ratio is not None]
        if len(found) < len(ratios):
            return None
        return min(*found, *self._caps())

    def _least_ratio(self, accounts: Sequence[Account], most: float) -> float:
        """The smallest ratio that holds whole contexts of all that run at once.

        Args:
            accounts: of the groups that differ.
            most: the largest ratio that fits; the answer where no smaller one does.
        """
        if self.fixed_ratio is not None:
            return most
        settings = accounts[0].settings
        wanted = max(settings.max_batch_size * settings.session_len, self.needed_tokens())

        def holds(step: int) -> bool:
            ratio = step / RATIO_STEPS
            return all(
                account.tokens_at(ratio) >= wanted and not account.cache_shortfall_at(ratio)
                for account in accounts
            )

        low, high = 0, round(most * RATIO_STEPS)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high / RATIO_STEPS

    def footprint(self, settings: Settings) -> int:
        """The most bytes that the engines of all groups hold, on all of their GPUs."""
        ratio = settings.cache_max_entry_count
        return sum(
            sum(self._remembered(settings, self._key(gpus), gpus).taken_at(ratio))
            for gpus in self.groups
        )

    def _caps(self) -> list[float]:
        """What rehearsals left of the ratios of these GPUs; 1 where there was none."""
        caps = self.request.ratio_caps
        return [
            1.0,
            *(caps[gpu.index] for gpus in self.groups for gpu in gpus if gpu.index in caps),
        ]

    def _short(self, accounts: Sequence[Account], ratio: float | None, kv_tokens: int) -> int:
        """Bytes that are missing on the tightest GPU; 0 where the shape serves."""
        missing = max(account.missing_at(ratio or 0.0) for account in accounts)
        if missing or ratio is None:
            return max(1, missing)
        first = accounts[0]
        cache_shortfall = max(account.cache_shortfall_at(ratio) for account in accounts)
        if cache_shortfall:
            return cache_shortfall
        tokens = self.needed_tokens() - kv_tokens
        return max(0, tokens, excess_tokens(self.request, self.vision_load)) * first.bytes_per_token

    def named(self, settings: Settings) -> list[Account]:
        """The accounts of all groups, each with its own GPUs, for words that name them."""
        return [self._account(settings, gpus) for gpus in self.groups]

    def needed_tokens(self) -> int:
        """What the cache must hold: a context that was promised, or else the workload's request."""
        longest = self.request.model.text.max_position_embeddings
        if self.request.workload.context is not None:
            return self.request.workload.context
        fixed = self.request.fixed.get("session_len")
        shortest = min(shortest_context(self.vision_load), longest)
        return min(shortest, fixed) if isinstance(fixed, int) else shortest

    def _holds(self, session_len: int) -> bool:
        """Whether the cache holds a whole context of this length, and the warm-up's request."""
        return self._held(session_len) >= session_len

    def _held(self, session_len: int) -> int:
        """The tokens that the cache holds with this context; 0 where the engine does not start."""
        accounts = self.accounts(session_len)
        ratio = self.ratio(accounts)
        if ratio is None or any(account.cache_shortfall_at(ratio) for account in accounts):
            return 0
        return min(account.tokens_at(ratio) for account in accounts)

    def _account(self, settings: Settings, gpus: tuple[Gpu, ...]) -> Account:
        return self.engine.account(launch_of(self.request, settings, gpus, self.vision_load))

    def _remembered(
        self, settings: Settings, key: tuple[object, ...], gpus: tuple[Gpu, ...]
    ) -> Account:
        whole = (settings, self.vision_load, key)
        if whole not in self.memo.accounts:
            self.memo.accounts[whole] = self._account(settings, gpus)
        return self.memo.accounts[whole]

    @property
    def distinct(self) -> list[tuple[Gpu, ...]]:
        """The groups that differ."""
        return list({self._key(gpus): gpus for gpus in self.groups}.values())

    def _key(self, gpus: tuple[Gpu, ...]) -> tuple[object, ...]:
        """What of a group an account and a speed depend on."""
        indices = tuple(gpu.index for gpu in gpus)
        if indices not in self.memo.keys:
            self.memo.keys[indices] = self._made_key(gpus)
        return self.memo.keys[indices]

    def _made_key(self, gpus: tuple[Gpu, ...]) -> tuple[object, ...]:
        """Two of equal cards decide."""
        first, rest = gpus[0], gpus[1:]
        unequal = len({(gpu.name, gpu.total) for gpu in gpus}) > 1
        fullest = max((known(gpu.reserved, 0) + known(gpu.used, 0) for gpu in rest), default=0)
        bandwidth = nvlink_bandwidth(self.request.machine, gpus)
        link = self.memo.link(self.request, gpus)
        speed = reduce_class(self.request.machine, gpus)
        return (
            first.name,
            first.total,
            first.reserved,
            first.used,
            fullest,
            link,
            bandwidth,
            speed,
            tuple(gpu.index for gpu in gpus) if unequal else (),
        )
