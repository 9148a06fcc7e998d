"""Engines on unequal cards: each set of like groups with the settings that serve most on it.

One gateway stands before them, so that clients are promised one thing: the image limits and the
context are common, and the weakest set bounds them. Cache ratio, prefill and batch are each set's
own, and it gets the share of the requests that the goal gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from msgspec.structs import replace

from turbofit.memory.engine import Engine
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.candidates import Evaluation, evaluate, scored, share_served
from turbofit.tuner.search.groups import like_groups
from turbofit.tuner.search.shape import Shape
from turbofit.tuner.search.share import evenly, held_shares, share_out
from turbofit.tuner.search.sizing import Memo, Outcome, Sizer
from turbofit.tuner.speed.throughput import Speed

__all__ = ["evaluate_unequal"]

Groups = tuple[tuple[int, ...], ...]


def evaluate_unequal(  # noqa: PLR0913 - all that an evaluation depends on
    request: ResolvedRequest,
    shape: Shape,
    dtype: str,
    vision_load: VisionLoad,
    requested_load: VisionLoad,
    engine: Engine,
    memo: Memo,
) -> Evaluation:
    """Evaluate a shape with ``prefills``: each set by itself, then all under one context."""
    return _Unequal(request, shape, dtype, vision_load, requested_load, engine, memo).evaluate()


class _Unequal:
    """One shape of unequal groups; arguments as for :func:`evaluate_unequal`."""

    def __init__(  # noqa: PLR0913 - a constructor
        self,
        request: ResolvedRequest,
        shape: Shape,
        dtype: str,
        vision_load: VisionLoad,
        requested_load: VisionLoad,
        engine: Engine,
        memo: Memo,
    ) -> None:
        self.request, self.shape, self.dtype = request, shape, dtype
        self.vision_load, self.requested_load, self.engine, self.memo = (
            vision_load,
            requested_load,
            engine,
            memo,
        )
        self.sets: tuple[Groups, ...] = like_groups(request.machine, shape.groups)

    def evaluate(self) -> Evaluation:
        """The better of even shares and of those that the goal gives."""
        requests, goal = self.request.workload.concurrency, self.request.workload.goal
        counts = [len(groups) for groups in self.sets]
        even: Sequence[float | None] = [None] * len(counts)
        if requests is not None:
            alike = [(count, 1.0) for count in counts]
            even = self._held_shares(lambda most: evenly(alike, requests, most))
        alone = [self._best(*pair, None) for pair in zip(self.sets, even, strict=True)]
        if not all(part.fits for part in alone):
            return self._whole(alone)
        promised = min(part.settings.session_len for part in alone)
        if requests is None:  # each engine has the batch that is best on its card
            return self._whole(self._agreed(even, promised))
        curves = list(zip(counts, map(self._curve, alone), strict=True))
        weighed = self._held_shares(lambda most: share_out(curves, requests, goal, most))
        found = [self._whole(self._agreed(shares, promised)) for shares in (even, weighed)]
        return max(found, key=lambda one: (one.fits, one.rank))

    def _held_shares(self, shared: Callable[[Sequence[float]], list[float]]) -> list[float]:
        """Shares of the requests of which each engine holds its own, where that is a promise."""

        def held(number: int, share: float) -> float:
            part = self._best(self.sets[number], share, None)
            return part.held / len(part.shape.groups)

        if self.request.promised_requests is None:
            return shared(())
        return held_shares(shared, held, len(self.sets))

    def _agreed(self, shares: Sequence[float | None], promised: int) -> list[Evaluation]:
        """The sets under these shares, with the longest context that all of them hold."""
        while True:
            pairs = zip(self.sets, shares, strict=True)
            parts = [self._best(groups, share, promised) for groups, share in pairs]
            least = min(part.settings.session_len for part in parts)
            if least >= promised:
                return parts
            promised = least

    def _best(self, groups: Groups, share: float | None, promised: int | None) -> Evaluation:
        """One set with the prefill that ranks best of those that hold the promised context."""
        tried = [
            evaluate(
                self.request,
                replace(
                    self.shape,
                    tp=len(groups[0]),
                    groups=groups,
                    max_prefill_token_num=prefill,
                    at_once=share,
                    promised=promised,
                    prefills=(),
                ),
                self.dtype,
                self.vision_load,
                self.requested_load,
                self.engine,
                self.memo,
            )
            for prefill in self.shape.prefills
        ]
        return max(tried, key=lambda one: _worth(one, promised or 0))

    def _curve(self, part: Evaluation) -> Callable[[float], Speed]:
        """One group's speed with so many requests there, at the cache that the part holds."""
        sizer = self._sizer(part)
        fixed = "max_batch_size" in self.request.fixed

        def speed(in_flight: float) -> Speed:
            batch = part.settings.max_batch_size if fixed else max(1, ceil(in_flight))
            settings = replace(part.settings, max_batch_size=batch)
            return sizer.speed(
                settings, sizer.groups[0], self.requested_load, part.kv_tokens, in_flight
            )

        return speed

    def _sizer(self, part: Evaluation) -> Sizer:
        return Sizer(self.request, part.shape, self.dtype, self.vision_load, self.engine, self.memo)

    def _whole(self, parts: Sequence[Evaluation]) -> Evaluation:
        """The sets as one shape: the weakest set's settings and tokens, the sum of the rates."""
        wanted, held = self.request.promised_requests or 0, sum(part.held for part in parts)
        serve = all(part.serves for part in parts)
        fits = all(part.fits for part in parts) and held >= wanted
        weakest = min(parts, key=lambda one: (one.fits, -one.short, one.kv_tokens))
        settings = weakest.settings
        evaluation = Evaluation(
            engine=self.engine.name,
            shape=replace(
                self.shape,
                tp=max(part.shape.tp for part in parts),
                max_prefill_token_num=settings.max_prefill_token_num,
            ),
            settings=settings,
            vision_load=self.vision_load,
            kv_tokens=weakest.kv_tokens,
            fits=fits,
            served=share_served(self.vision_load, self.requested_load),
            short=max(part.short for part in parts),
            footprint=sum(part.footprint for part in parts),
            held=held if serve else 0,
            parts=tuple(parts),
        )
        if not fits:
            return replace(evaluation, short=evaluation.short or self._lacking(evaluation))
        by_group = {
            group: speed
            for part in parts
            for group, speed in zip(part.shape.groups, part.speeds, strict=True)
        }
        evaluation = replace(
            evaluation,
            speeds=tuple(by_group[group] for group in self.shape.groups),
            seconds_per_answer=max(part.seconds_per_answer for part in parts),
        )
        return scored(self.request, evaluation)

    def _lacking(self, whole: Evaluation) -> int:
        """Bytes that are missing in the caches of all engines together for the requests."""
        tokens = sum(part.kv_tokens * part.shape.replicas for part in whole.parts)
        outcome = Outcome(ratio=None, kv_tokens=tokens, short=0)
        requests, context = self.request.promised_requests or 0, whole.settings.session_len
        return self._sizer(whole.parts[0]).lacking(outcome, context, requests)


def _worth(evaluation: Evaluation, promised: int) -> tuple[object, ...]:
    """What decides between prefills of one set; of those that do not fit as in the search."""
    if evaluation.fits:
        return (1, evaluation.settings.session_len >= promised, *evaluation.rank)
    return (0, evaluation.held, -evaluation.short, evaluation.shape.max_prefill_token_num)
