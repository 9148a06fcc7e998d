"""Finds what to run after a death for lack of GPU memory, bounded by the settings that died.

The log is right. Where an allocation was refused after the cache had its share of the card, or the
log does not say when, no step and no plan has a larger share than the run that died
(`largest_share`), also where the account says that the run fits an empty card. A cache that could
not be sized is the other way round: a larger share is one of its cures.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.core.errors import option_of
from turbofit.core.plan import Remedy
from turbofit.logs.account import logged_cache, most
from turbofit.machine.torch_memory import TorchMemory

if TYPE_CHECKING:
    from turbofit.core.machine import Machine
    from turbofit.core.model import Model
    from turbofit.core.plan import Plan
    from turbofit.logs.answer import Draft
    from turbofit.logs.case import LogCase

#: The share to try after one that died: so much less, or this part of it; the larger of both.
_LESS, _PART = 0.1, 0.75
#: Phases in which the cache may have had its share, and those in which images may be the reason.
_WITH_SHARE: Final = ("cache", "warm-up", "vision", "text", "serving", "unknown", "communication")
_WITH_LIMIT: Final = ("vision", "serving", "unknown")
_DEGREES: Final = (2, 4, 8)
#: Smaller forwards, smaller batches and larger shares that are tried.
_PREFILLS: Final = (4096, 2048, 1024, 512)
_BATCHES: Final = (64, 32, 16, 8, 4, 1)
_LARGER: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
_SHARE: Final = "--cache-max-entry-count"


class NextRun(NamedTuple):
    """What the log's run may try next.

    ``ways``: changes with which it lives by the account, each with its plan; the cheapest first.
    ``share``: the share of the cache to try; None if none is named. ``leaves``: the share that
    leaves what torch asked, if all that the cache left was still free. ``fits``: whether the run
    that died fits such cards by the account, which the log contradicts. ``too_small``: what happens
    with every lower share, where a cache too small for a start is the reason; else empty.
    ``counted``: there is an account of the run.
    """

    ways: tuple[tuple[Remedy, Plan], ...] = ()
    share: float | None = None
    leaves: float | None = None
    fits: bool = False
    too_small: str = ""
    counted: bool = False


def largest_share(case: LogCase, draft: Draft) -> float | None:
    """Return the largest share of the cache that a step or a plan may have; None for no bound."""
    of_share = case.subject.of_lmdeploy and draft.kind == "out_of_memory" and not draft.unsized
    return case.ratio if of_share else None


def next_run(case: LogCase, draft: Draft) -> NextRun:
    """Return what the run of a log may try next, after a death that ``draft`` tells of."""
    known, share, leaves = bool(draft.what and largest_share(case, draft)), None, None
    if known and draft.phase in _WITH_SHARE and not case.on_jetson:
        share, leaves = _lower_share(case, draft)
    if not (draft.short and case.has_account):
        return NextRun(share=leaves or share)
    search = _Search(case, draft)
    if search.before is None:
        return NextRun(share=leaves or share)
    if draft.unsized:
        ways = () if search.fits else search.of_unsized()
        return NextRun(ways=ways, fits=search.fits, counted=True)
    return search.of_refused(share)._replace(leaves=leaves)


def _lower_share(case: LogCase, draft: Draft) -> tuple[float | None, float | None]:
    """Return the share below the one that died, and the share that torch's figures tell.

    The first is None where no share helps: for one tensor larger than the card, or where the option
    is a number of blocks. The second is None without figures, and where it would be higher. It is
    lower than need be if memory was taken after the cache was made.
    """
    died, marks = case.ratio, case.facts.every(TorchMemory)
    memory = next((event for mark, event in marks if mark.line == draft.line), TorchMemory())
    oversized = (memory.requested or 0) > (memory.total or math.inf)
    if died >= 1 or oversized:
        return None, None
    lower = round(max(died - _LESS, _PART * died), 4)
    if memory.missing is None or not memory.free:
        return lower, None
    cache = logged_cache(case)
    before = cache.free if cache else memory.free / (1 - died)
    leaves = int(100 * (died - memory.missing / before)) / 100
    return lower, leaves if 0 < leaves < lower else None


class _Search:
    """Runs of a log with changed settings, by the account of the log's release.

    A changed run lives if it fits, and takes as many bytes less as the log says were missing.
    """

    def __init__(self, case: LogCase, draft: Draft) -> None:
        self.case, self.phase = case, draft.phase
        self.machine, self.model = _known(case)
        self.cache = None if draft.emptied else logged_cache(case)
        self.kept: dict[str, Any] = {"free_at_cache": self.cache.free} if self.cache else {}
        if draft.by_others and not draft.emptied:
            self.kept = {"on": self.machine.with_used(draft.by_others)}
        self.before = case.forecast(**self.kept)
        self.lacked = draft.missing.bytes if draft.missing else None
        self.fits = self.before is not None and self.before.fits

    def of_refused(self, share: float | None) -> NextRun:
        """Return the changes that cure a refused allocation; none raises the cache's share."""
        best, plan, too_small = self._share(share) if share else (None, None, "")
        if plan is None and share and self.fits and self.lacked:
            # Once the cards are free nothing is missing by the account.
            best, plan, too_small = self._without_shortage()._share(share)
        ways = [] if plan is None else [_way(f"{_SHARE} {best:g}", plan)]
        if self.fits and self.lacked is None:
            ways += [] if ways else self._smaller_forward(share)
        else:
            ways += self._limit(share if plan is None else None)
            ways += [] if ways else self._smaller_forward(share)
            ways += self._degree()
        told = NextRun(ways=tuple(ways), share=best or share, fits=self.fits, counted=True)
        return told._replace(too_small="" if plan else too_small)

    def _without_shortage(self) -> _Search:
        search = copy(self)
        search.lacked = None
        return search

    def of_unsized(self) -> tuple[tuple[Remedy, Plan], ...]:
        """Return the changes that give a cache which could not be sized its first blocks."""
        settings = self.before.smallest.settings if self.before else self.case.settings
        batches = [n for n in _BATCHES if n < settings.max_batch_size]
        shares = [n for n in _LARGER if n > self.case.ratio]
        smaller = self._first("--max-batch-size {}", "max_batch_size", batches)
        larger = self._first(f"{_SHARE} {{}}", "cache_max_entry_count", shares)
        return (*smaller, *larger, *self._degree())

    def _lives(self, **changed: Any) -> Plan | None:
        plan = self._run(**changed)
        return plan if plan and plan.fits and self._spares(plan) else None

    def _run(self, **changed: Any) -> Plan | None:
        # The bytes that were free for the cache are known only for the log's own tp.
        elsewhere = "tp" in changed and self.cache is not None
        kept = {"on": self.machine} if elsewhere else self.kept
        return self.case.forecast(**kept, **changed)

    def _spares(self, plan: Plan) -> bool:
        """Whether a plan leaves each GPU its margin, and what the log says was missing."""
        assert self.before is not None
        enough = most(self.before, self.phase) - (self.lacked or 0)
        tight = any(max(gpu.peak, gpu.load_peak) + gpu.margin > gpu.usable for gpu in plan.ledgers)
        return not tight and most(plan, self.phase) <= enough

    def _share(self, first: float, **changed: Any) -> tuple[float | None, Plan | None, str]:
        """Return the largest share from ``first`` down that lives, and its plan.

        If its cache is too small for a start, the least share below the log's that starts. If there
        is none, the third value tells what happens instead.
        """
        shares = [first, *(n / 100 for n in range(int(first * 100 - 1e-6), 0, -1))]

        @cache
        def at(share: float) -> Plan | None:
            return self._run(cache_max_entry_count=share, **changed)

        def spares(share: float) -> bool:
            plan = at(share)
            return plan is not None and self._spares(plan)

        place = 0 if spares(first) else bisect_left(shares, True, key=spares)
        if place == len(shares):
            return None, None, ""
        plan = at(shares[place])
        if plan is None or plan.fits:
            return shares[place], plan, ""
        higher = range(int(first * 1000) + 1, round(self.case.ratio * 1000)) if place == 0 else ()
        least = bisect_left(higher, True, key=lambda n: self._starts(at(n / 1000)))
        if higher[least:]:
            plan = at(higher[least] / 1000)
        if plan and plan.fits and self._spares(plan):
            return higher[least] / 1000, plan, ""
        return None, None, plan.verdict if plan else ""

    def _starts(self, plan: Plan | None) -> bool:
        """Return whether a cache is not too small for a start, though it may be too large."""
        return plan is not None and (plan.fits or not self._spares(plan))

    def _limit(self, share: float | None) -> list[tuple[Remedy, Plan]]:
        """Return the largest common image limit that lives, beside a lower share if need be.

        ``share``: the share to begin with; None if a share alone is enough.
        """
        rule = self.model.image_rule
        if rule is None or self.phase not in _WITH_LIMIT or not rule.varies_by_limit:
            return []
        option = option_of(rule.limit_name)
        limits = [n for n in rule.common_limits if n < rule.checkpoint_limit]
        alone = self._first(f"{option} {{}} for every image", rule.limit_name, limits)
        if alone or share is None:
            return alone
        for n in limits:
            best, plan, _ = self._share(share, **{rule.limit_name: n})
            if plan is not None:
                return [_way(f"{option} {n} for every image, with {_SHARE} {best:g}", plan)]
        return []

    def _smaller_forward(self, share: float | None) -> list[tuple[Remedy, Plan]]:
        """Return a smaller forward, whose warm-up a small cache holds, with a lower share."""
        assert self.before is not None
        now = self.before.smallest.settings.max_prefill_token_num
        for n in (n for n in _PREFILLS if share and n < now):
            best, plan, _ = self._share(share or 0, max_prefill_token_num=n)
            if plan is not None:
                return [_way(f"--max-prefill-token-num {n} {_SHARE} {best:g}", plan)]
        return []

    def _degree(self) -> list[tuple[Remedy, Plan]]:
        degrees = [n for n in _DEGREES if self.case.tp < n <= len(self.machine.gpus)]
        return self._first("--tp {}", "tp", degrees)

    def _first(self, words: str, name: str, values: list[Any]) -> list[tuple[Remedy, Plan]]:
        """Return the first of some values of an option with which the run lives."""
        for n in values:
            if plan := self._lives(**{name: n}):
                return [_way(words.format(n), plan)]
        return []


def _known(case: LogCase) -> tuple[Machine, Model]:
    assert case.machine is not None
    assert case.model is not None
    return case.machine, case.model


def _way(change: str, plan: Plan) -> tuple[Remedy, Plan]:
    return Remedy(change=change, effect=f"lives, with {plan.smallest.kv.tokens:,} KV tokens"), plan
