"""Finds what to run after a lack of GPU memory, within the bounds of the run that died.

The log is right, also against the account. If an allocation was refused after the cache had its
share of the card, no step and no plan has a larger share than the run that died (`largest_share`).
The same bound holds if the log does not say when the allocation was refused. There is no bound if
the cache could not be sized: then a larger share is one of the cures.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache
from typing import Any, Final, NamedTuple

from turbofit.core.engine_end import Phase
from turbofit.core.errors import option_of
from turbofit.core.machine import Machine
from turbofit.core.plan import Plan, Remedy
from turbofit.logs.account import logged_cache, most
from turbofit.logs.answer import Draft
from turbofit.logs.case import DEGREES, LEAST_SHARE, LogCase
from turbofit.machine.torch_memory import TorchMemory

#: The share of the cache to try is lower by `_LESS` than the share that died, but at least `_PART`
#: of this share.
_LESS, _PART = 0.1, 0.75
#: Phases in which the cache may already have had its share of the card.
_WITH_SHARE: Final = ("cache", "warm-up", "vision", "text", "serving", "unknown", "communication")
#: Phases in which images may be the reason of a lack of memory.
_WITH_LIMIT: Final = ("vision", "serving", "unknown")
#: Values to try in this order: forwards in tokens, batches in requests, shares of the cache.
_PREFILLS: Final = (4096, 2048, 1024, 512)
_BATCHES: Final = (512, 256, 128, 64, 32, 16, 8, 4, 1)
_LARGER: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
#: LMDeploy's words where the states of linear attention, one a request, have no room.
OF_STATES: Final = "memory for state cache"
SHARE: Final = "--cache-max-entry-count"


class NextRun(NamedTuple):
    """The changes to try with the log's run.

    ``ways``: changes with which the run lives by the account, each with its plan, the cheapest
    first. ``share``: the share of the cache to try; None if no lower share helps. ``fits``: whether
    the run fits such cards by the account, although it died; None without an account.
    ``too_small``: the verdict on lower shares, if all make a cache too small for a start.
    """

    ways: tuple[tuple[Remedy, Plan], ...] = ()
    share: float | None = None
    fits: bool | None = None
    too_small: str = ""


def largest_share(case: LogCase, draft: Draft) -> float | None:
    """Return the largest share of the cache for any step and plan; None for no bound."""
    of_share = case.subject.of_lmdeploy and draft.kind == "out_of_memory" and not draft.unsized
    return case.ratio if of_share else None


def next_run(case: LogCase, draft: Draft) -> NextRun:
    """Return the changes to try with the run of a log, after the death in ``draft``."""
    if draft.contradicts:
        return NextRun()
    if OF_STATES in draft.quoted:
        states = _Search.of(case, draft)
        return NextRun(ways=states.smaller_batch() if states else ())
    known, share = bool(draft.what and largest_share(case, draft)), None
    marks = case.facts.every(TorchMemory)
    memory = next((event for mark, event in marks if mark.line == draft.line), TorchMemory())
    if known and draft.phase in _WITH_SHARE and not case.on_jetson:
        share = _lower_share(case, memory)
    search = _Search.of(case, draft) if draft.short and case.has_account else None
    if search is None:
        return NextRun(share=_sparing_share(case, memory, share))
    return search.of_unsized() if draft.unsized else search.of_refused(share)


def _lower_share(case: LogCase, memory: TorchMemory) -> float | None:
    """Return the share of the cache to try after the share that died.

    None if no share helps: one tensor is larger than the card, the option is a number of blocks, or
    the share that died was so small that the cache is not what took the memory.
    """
    died, oversized = case.ratio, (memory.requested or 0) > (memory.total or math.inf)
    if died >= 1 or oversized or case.tiny_share:
        return None
    return max(round(max(died - _LESS, _PART * died), 4), LEAST_SHARE)


def _sparing_share(case: LogCase, memory: TorchMemory, lower: float | None) -> float | None:
    """Return the share that leaves the bytes that torch asked, or ``lower`` if that is smaller.

    The share assumes that only the cache took memory before the refused allocation. If other memory
    was taken, too, a larger share would do.
    """
    if lower is None or memory.missing is None or not memory.free:
        return lower
    logged = logged_cache(case)
    before = logged.free if logged else memory.free / (1 - case.ratio)
    leaves = int(100 * (case.ratio - memory.missing / before)) / 100
    if logged and leaves < LEAST_SHARE:
        return None
    return leaves if LEAST_SHARE <= leaves < lower else lower


class _Search(NamedTuple):
    """Runs of a log with changed settings, by the account of the log's release.

    A changed run lives if it fits, and saves at least the bytes that the log's run lacked.
    ``before``: the run that died. ``kept``: the memory that was free for that run, as arguments of
    a forecast. ``lacked``: the missing bytes; None if the log does not say them.
    """

    case: LogCase
    phase: Phase
    machine: Machine
    before: Plan
    kept: dict[str, Any]
    lacked: int | None

    @classmethod
    def of(cls, case: LogCase, draft: Draft) -> _Search | None:
        """Return the search for a log's run; None without an account of the run."""
        logged, kept = logged_cache(case), dict[str, Any]()
        if case.machine and draft.by_others and not draft.emptied:
            kept = {"on": case.machine.with_used(draft.by_others)}
        elif logged and not draft.emptied:
            kept = {"free_at_cache": logged.free}
        before = case.forecast(**kept)
        if before is None or case.machine is None:
            return None
        lacked = draft.missing.bytes if draft.missing else None
        return cls(case, draft.phase, case.machine, before, kept, lacked)

    def of_refused(self, share: float | None) -> NextRun:
        """Return the changes that cure a refused allocation, without a larger share."""
        fits = self.before.fits
        best, plan, too_small = self._share(share) if share else (None, None, "")
        if plan is None and share and fits and self.lacked:
            # By the account the run fits cards that are free, so a share need not save any bytes.
            best, plan, too_small = self._replace(lacked=None)._share(share)
        ways = [] if plan is None else [_way(f"{SHARE} {best:g}", plan)]
        counted = not fits or self.lacked is not None
        ways += self._limit(None if plan else share) if counted else []
        ways = ways or self._smaller_forward(share)
        ways += self._degree() if counted else []
        return NextRun(
            ways=tuple(ways),
            share=best or share,
            fits=fits,
            too_small="" if plan else too_small,
        )

    def of_unsized(self) -> NextRun:
        """Return the changes that make room for the first blocks of a cache."""
        if self.before.fits:
            return NextRun(fits=True)
        shares = [n for n in _LARGER if n > self.case.ratio]
        smaller = self.smaller_batch()
        larger = self._first(f"{SHARE} {{}}", "cache_max_entry_count", shares)
        return NextRun(ways=(*smaller, *larger, *self._degree()), fits=False)

    def smaller_batch(self) -> tuple[tuple[Remedy, Plan], ...]:
        """Return the largest common batch, below the log's, with which the run lives."""
        now = max(engine.settings.max_batch_size for engine in self.before.engines)
        batches = [n for n in _BATCHES if n < now]
        return tuple(self._first("--max-batch-size {}", "max_batch_size", batches))

    def _run(self, **changed: Any) -> Plan | None:
        # The bytes that were free for the cache are known only for the log's own tp.
        unknown = "tp" in changed and "free_at_cache" in self.kept
        return self.case.forecast(**({} if unknown else self.kept), **changed)

    def _lives(self, plan: Plan) -> bool:
        return plan.fits and self._spares(plan)

    def _spares(self, plan: Plan | None) -> bool:
        """Whether a plan leaves each GPU its margin and the missing bytes of the log."""
        if plan is None:
            return False
        enough = most(self.before, self.phase) - (self.lacked or 0)
        tight = any(gpu.most + gpu.margin > gpu.usable for gpu in plan.ledgers)
        return not tight and most(plan, self.phase) <= enough

    def _share(self, first: float, **changed: Any) -> tuple[float | None, Plan | None, str]:
        """Return the largest share from ``first`` down with which the run lives, and its plan.

        If the cache of that share is too small for a start, return the least larger share that
        starts, below the log's share. If no share starts, the third value is the verdict.
        """
        least = round(LEAST_SHARE * 100)
        shares = [first, *(n / 100 for n in range(int(first * 100 - 1e-6), least - 1, -1))]
        plan_with = cache(lambda share: self._run(cache_max_entry_count=share, **changed))

        def spares(share: float) -> bool:
            return self._spares(plan_with(share))

        place = 0 if spares(first) else bisect_left(shares, True, key=spares)
        if place == len(shares):
            return None, None, ""
        plan = plan_with(shares[place])
        if plan is None or plan.fits:
            return shares[place], plan, ""
        higher = range(int(first * 1000) + 1, round(self.case.ratio * 1000)) if place == 0 else ()
        least = bisect_left(higher, True, key=lambda n: self._starts(plan_with(n / 1000)))
        if higher[least:]:
            plan = plan_with(higher[least] / 1000)
        if plan and self._lives(plan):
            return higher[least] / 1000, plan, ""
        return None, None, plan.verdict if plan else ""

    def _starts(self, plan: Plan | None) -> bool:
        """Return whether the cache of a plan is large enough for a start."""
        return plan is not None and (plan.fits or not self._spares(plan))

    def _limit(self, share: float | None) -> list[tuple[Remedy, Plan]]:
        """Return the largest common image limit with which the run lives.

        If no limit alone is enough, a limit is combined with a lower share of the cache. ``share``
        is the largest share for this; with None no share is tried.
        """
        rule = self.before.model.image_rule
        if rule is None or self.phase not in _WITH_LIMIT or not rule.varies_by_limit:
            return []
        words, name = f"{option_of(rule.limit_name)} {{}} for every image", rule.limit_name
        limits = [n for n in rule.common_limits if n < rule.checkpoint_limit]
        alone = self._first(words, name, limits)
        if alone or share is None:
            return alone
        return self._first(f"{words}, with {SHARE} {{:g}}", name, limits, share)

    def _smaller_forward(self, share: float | None) -> list[tuple[Remedy, Plan]]:
        """Return a smaller forward and a lower share: its smaller warm-up needs less cache.

        If the share is as low as can be, the smaller forward stands alone.
        """
        now = max(engine.settings.max_prefill_token_num for engine in self.before.engines)
        smaller = [n for n in _PREFILLS if n < now]
        if share is None and not self.case.tiny_share:
            return []
        words = f"--max-prefill-token-num {{}}{f' {SHARE} {{:g}}' if share else ''}"
        return self._first(words, "max_prefill_token_num", smaller, share)

    def _degree(self) -> list[tuple[Remedy, Plan]]:
        degrees = [n for n in DEGREES if self.case.tp < n <= len(self.machine.gpus)]
        return self._first("--tp {}", "tp", degrees)

    def _first(
        self, words: str, name: str, values: list[Any], share: float | None = None
    ) -> list[tuple[Remedy, Plan]]:
        """Return the first value of an option with which the run lives.

        ``share``: also try this share of the cache and all lower shares beside each value.
        """
        for n in values:
            best, plan = None, self._run(**{name: n}) if share is None else None
            if share is not None:
                best, plan, _ = self._share(share, **{name: n})
            if plan and self._lives(plan):
                return [_way(words.format(n, best), plan)]
        return []


def _way(change: str, plan: Plan) -> tuple[Remedy, Plan]:
    tokens = min(engine.kv.tokens for engine in plan.engines)
    return Remedy(change=change, effect=f"lives, with {tokens:,} KV tokens"), plan
