"""One shape, judged: does it fit, how many tokens does it hold, what is it worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.machine import Gpu
from turbofit.core.plan import Candidate, Settings
from turbofit.core.struct import Struct, known
from turbofit.memory.exposure import Exposure
from turbofit.memory.turbomind.account import Account
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.fate import fate_at, fate_without_cache
from turbofit.tuner.ask import Ask
from turbofit.tuner.links import LinkClass, group_class, nvlink_bandwidth
from turbofit.tuner.throughput import Speed, group_speed

__all__ = [
    "MIN_TEXT_TOKENS",
    "Judged",
    "Memo",
    "Shape",
    "explain",
    "judge",
    "shape_settings",
    "shortest_context",
]

#: Tokens of text and answer that a context must hold beside the images to be of use.
MIN_TEXT_TOKENS = 1024
_CONTEXT_STEP = 64
_ROUND_CONTEXT = 1024


class Shape(Struct):
    """A point of the search space; ``units_per_forward`` None pays for the engine's own bound."""

    tp: int
    groups: tuple[tuple[int, ...], ...]
    max_prefill_token_num: int
    limit: int | None
    units_per_forward: int | None = None

    @property
    def replicas(self) -> int:
        """Groups that serve side by side."""
        return len(self.groups)


class Judged(Struct):
    """A shape with its settings, and whether it serves.

    ``short`` is how many bytes are missing on the tightest GPU of a shape that does not; why it
    does not is told by :func:`explain`, since a search needs the words of few shapes.
    """

    shape: Shape
    settings: Settings
    exposure: Exposure
    kv_tokens: int
    fits: bool
    score: float = 0.0
    short: int = 0
    speeds: tuple[Speed, ...] = ()

    @property
    def rank(self) -> tuple[float, ...]:
        """What is compared: the score, then tokens, then the larger prefill, then fewer shards."""
        shape = self.shape
        return (self.score, self.kv_tokens, shape.max_prefill_token_num, -shape.tp)

    def candidate(self, why_not: str) -> Candidate:
        """The row of ``considered``."""
        kept = ("max_prefill_token_num", "max_batch_size", "session_len", "cache_max_entry_count")
        settings: dict[str, Any] = {name: getattr(self.settings, name) for name in kept}
        if self.shape.limit is not None:
            settings["limit"] = self.shape.limit
        return Candidate(
            engine="turbomind",
            tp=self.shape.tp,
            replicas=self.shape.replicas,
            groups=self.shape.groups,
            settings=settings,
            fits=self.fits,
            kv_tokens=self.kv_tokens,
            score=self.score,
            why_not=why_not,
        )


def shape_settings(ask: Ask, shape: Shape, session_len: int, dtype: str) -> Settings:
    """The engine's options for a shape; what the user fixed stays.

    Raises:
        UsageError: a fixed option has a value that LMDeploy does not take.
    """
    chosen: dict[str, object] = {
        "dtype": dtype,
        "max_batch_size": max(1, -(-ask.workload.concurrency // shape.replicas)),
        "session_len": session_len,
        "model_format": ask.model.quantization.method if ask.model.quantization else None,
    }
    chosen.update(ask.fixed)
    chosen.update(tp=shape.tp, max_prefill_token_num=shape.max_prefill_token_num)
    try:
        return msgspec.convert(chosen, Settings)
    except msgspec.ValidationError as exc:
        raise UsageError(
            f"an engine option cannot be used: {exc}", hint="see turbofit plan --help"
        ) from None


def shortest_context(exposure: Exposure) -> int:
    """The least ``session_len`` that serves the workload's request."""
    need = exposure.tokens_per_request + MIN_TEXT_TOKENS
    return -(-need // _CONTEXT_STEP) * _CONTEXT_STEP


class Memo:
    """Accounts and speeds of one search, so that a group met in many groupings is judged once.

    Equal cards behind equal links are one group here whatever their indices: the first card and the
    fullest of the others decide all that a search asks of an account.
    """

    def __init__(self) -> None:
        self.accounts: dict[tuple[object, ...], Account] = {}
        self.speeds: dict[tuple[object, ...], Speed] = {}
        self.links: dict[tuple[int, ...], LinkClass] = {}

    def link(self, ask: Ask, gpus: Sequence[Gpu]) -> LinkClass:
        """The group's link class."""
        key = tuple(gpu.index for gpu in gpus)
        if key not in self.links:
            self.links[key] = group_class(ask.machine, gpus)
        return self.links[key]


def judge(
    ask: Ask,
    shape: Shape,
    dtype: str,
    exposure: Exposure,
    asked: Exposure,
    constants: EngineConstants,
    memo: Memo | None = None,
) -> Judged:
    """Size the context and the ratio of a shape, and score what comes out."""
    sizer = _Sizer(ask, shape, dtype, exposure, constants, memo or Memo())
    session_len = sizer.session_len()
    accounts = sizer.accounts(session_len)
    settings = accounts[0].settings
    ratio = sizer.ratio(accounts)
    kv_tokens = 0 if ratio is None else min(account.tokens_at(ratio) for account in accounts)
    short = sizer.short(accounts, ratio, kv_tokens)
    if ratio is not None:
        settings = replace(settings, cache_max_entry_count=ratio)
    judged = Judged(
        shape=shape,
        settings=settings,
        exposure=exposure,
        kv_tokens=kv_tokens,
        fits=not short,
        short=short,
    )
    if short:
        return judged
    speeds = tuple(sizer.speed(settings, gpus, asked, kv_tokens) for gpus in sizer.groups)
    return replace(judged, speeds=speeds, score=_score(ask, judged, speeds, exposure, asked))


def explain(ask: Ask, judged: Judged, dtype: str, constants: EngineConstants) -> str:
    """Why a shape does not serve, in words; empty where it does."""
    if judged.fits:
        return ""
    sizer = _Sizer(ask, judged.shape, dtype, judged.exposure, constants, Memo())
    accounts = sizer.named(judged.settings)
    ratio = sizer.ratio(accounts)
    if ratio is None:
        fates = [fate_without_cache(account) for account in accounts]
    else:
        fates = [fate_at(account, ratio) for account in accounts]
    bad = [fate for fate in fates if fate.kind != "serves"]
    if bad:
        return max(bad, key=lambda fate: fate.missing).text
    return f"the cache holds {judged.kv_tokens} tokens, one request needs {sizer.needed_tokens()}"


def _score(
    ask: Ask, judged: Judged, speeds: Sequence[Speed], exposure: Exposure, asked: Exposure
) -> float:
    """The goal's value; a shape that serves less than was asked comes after all that serve it."""
    goal = ask.workload.goal
    if goal == "throughput":
        value = sum(speed.requests_per_second for speed in speeds)
    elif goal == "latency":
        value = 1 / max(speed.seconds_per_request for speed in speeds)
    else:
        value = float(judged.kv_tokens)
    served = (
        exposure.units_per_request / asked.units_per_request if asked.units_per_request else 1.0
    )
    queued = 0.0 if judged.shape.units_per_forward is None else 1e-6
    return value - (1.0 - served + queued) * 1e12


class _Sizer:
    """Finds the context and the ratio of one shape."""

    def __init__(
        self,
        ask: Ask,
        shape: Shape,
        dtype: str,
        exposure: Exposure,
        constants: EngineConstants,
        memo: Memo,
    ) -> None:
        self.ask = ask
        self.memo = memo
        self.shape = shape
        self.dtype = dtype
        self.exposure = replace(exposure, units_per_forward=shape.units_per_forward)
        self.constants = constants
        self.groups: list[tuple[Gpu, ...]] = [
            tuple(ask.machine.gpu(index) for index in group) for group in shape.groups
        ]
        self.fixed_ratio = ask.fixed.get("cache_max_entry_count")

    def accounts(self, session_len: int) -> list[Account]:
        """The accounts of the groups that differ; their indices may be another equal group's."""
        settings = shape_settings(self.ask, self.shape, session_len, self.dtype)
        distinct = {self._key(gpus): gpus for gpus in self.groups}
        return [self._remembered(settings, key, gpus) for key, gpus in distinct.items()]

    def speed(
        self, settings: Settings, gpus: tuple[Gpu, ...], asked: Exposure, kv_tokens: int
    ) -> Speed:
        """The forecast of one group."""
        key = (settings, self._key(gpus), asked, kv_tokens)
        if key not in self.memo.speeds:
            self.memo.speeds[key] = group_speed(
                self.ask.model, settings, self.ask.machine, gpus, asked, kv_tokens, self.constants
            )
        return self.memo.speeds[key]

    def session_len(self) -> int:
        """The context: the user's, or the model's own lowered to what the cache holds."""
        fixed = self.ask.fixed.get("session_len", self.ask.workload.context)
        if isinstance(fixed, int):
            return fixed
        longest = self.ask.model.text.max_position_embeddings
        low = min(shortest_context(self.exposure), longest)
        if self._holds(longest):
            return longest
        if not self._holds(low):
            return low
        high = longest
        while high - low > _CONTEXT_STEP:
            middle = (low + high) // 2 // _CONTEXT_STEP * _CONTEXT_STEP
            if middle <= low:
                break
            if self._holds(middle):
                low = middle
            else:
                high = middle
        rounded = low // _ROUND_CONTEXT * _ROUND_CONTEXT
        return rounded if rounded >= shortest_context(self.exposure) else low

    def ratio(self, accounts: Sequence[Account]) -> float | None:
        """The largest ratio that fits every group, or the user's own."""
        if isinstance(self.fixed_ratio, int | float):
            return float(self.fixed_ratio)
        ratios = [account.best_ratio() for account in accounts]
        found = [ratio for ratio in ratios if ratio is not None]
        if len(found) < len(ratios):
            return None
        cap = self.ask.ratio_cap
        return min(found) if cap is None else min(*found, cap)

    def short(self, accounts: Sequence[Account], ratio: float | None, kv_tokens: int) -> int:
        """Bytes that are missing on the tightest GPU; 0 where the shape serves."""
        missing = max(account.missing_at(ratio or 0.0) for account in accounts)
        if missing or ratio is None:
            return max(1, missing)
        first = accounts[0]
        if any(account.hangs_at(ratio) for account in accounts):
            needed = first.blocks_for_warmup * first.shape.block_tokens
            return max(1, needed - kv_tokens) * first.shape.bytes_per_token
        return max(0, self.needed_tokens() - kv_tokens) * first.shape.bytes_per_token

    def named(self, settings: Settings) -> list[Account]:
        """The accounts of all groups, each with its own GPUs, for words that name them."""
        return [self._account(settings, gpus) for gpus in self.groups]

    def needed_tokens(self) -> int:
        """What the cache must hold: a context that was promised, or else the workload's request."""
        longest = self.ask.model.text.max_position_embeddings
        if self.ask.workload.context is not None:
            return self.ask.workload.context
        fixed = self.ask.fixed.get("session_len")
        shortest = min(shortest_context(self.exposure), longest)
        return min(shortest, fixed) if isinstance(fixed, int) else shortest

    def _holds(self, session_len: int) -> bool:
        """Whether the cache holds a whole context of this length, and the warm-up's request."""
        accounts = self.accounts(session_len)
        ratio = self.ratio(accounts)
        if ratio is None:
            return False
        return all(
            account.tokens_at(ratio) >= session_len and not account.hangs_at(ratio)
            for account in accounts
        )

    def _account(self, settings: Settings, gpus: tuple[Gpu, ...]) -> Account:
        return Account(
            self.ask.model,
            settings,
            gpus,
            self.ask.machine,
            self.exposure,
            self.constants,
            [self.ask.margin_of(gpu) for gpu in gpus],
        )

    def _remembered(
        self, settings: Settings, key: tuple[object, ...], gpus: tuple[Gpu, ...]
    ) -> Account:
        whole = (settings, self.exposure, key)
        if whole not in self.memo.accounts:
            self.memo.accounts[whole] = self._account(settings, gpus)
        return self.memo.accounts[whole]

    def _key(self, gpus: tuple[Gpu, ...]) -> tuple[object, ...]:
        """What of a group of equal cards an account and a speed depend on."""
        first, rest = gpus[0], gpus[1:]
        fullest = max((known(gpu.used, 0) for gpu in rest), default=0)
        bandwidth = nvlink_bandwidth(self.ask.machine, gpus)
        link = self.memo.link(self.ask, gpus)
        return (first.name, first.total, first.reserved, first.used, fullest, link, bandwidth)
