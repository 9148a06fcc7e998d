"""Evaluates one shape: whether it fits, how many tokens it holds, and its rank."""

from __future__ import annotations

from math import ceil
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.messages import on_each_gpu
from turbofit.core.plan import Candidate, Settings
from turbofit.core.struct import Struct
from turbofit.core.units import format_bytes
from turbofit.memory.engine import Engine
from turbofit.memory.start_outcome import outcome_at, outcome_without_cache
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.resolved_request import ResolvedRequest
from turbofit.tuner.search.batch import most_held, with_best_batch
from turbofit.tuner.search.context import excess_tokens, most_context
from turbofit.tuner.search.shape import Shape
from turbofit.tuner.search.sizing import Memo, Sizer
from turbofit.tuner.speed.throughput import Speed, counted_tokens, request_tokens

__all__ = ["Evaluation", "evaluate", "explain", "scored", "share_served", "too_long"]


#: Digits of a score: sums of the same speeds in another order are the same.
_DIGITS: Final = 9


class Evaluation(Struct):
    """A shape with its settings, and whether it serves.

    ``short`` is how many bytes are missing on the tightest GPU of a shape that does not; why it
    does not is told by :func:`explain`, since a search needs the words of few shapes. ``score`` is
    the goal's value, ``served`` the share of the vision units asked for that it serves, ``queues``
    whether image requests wait though nobody asked for that. ``parts`` are the sets of like groups
    where cards are unequal; ``settings`` and ``kv_tokens`` are then those of the weakest,
    ``speeds`` are in the order of the shape's groups. With the goal of latency
    ``seconds_per_answer`` is the slowest group's, with the requests that were asked for there, or
    with one. ``wants_cache``: more cache would run more requests at once. ``footprint`` are the
    bytes of all GPUs that it takes, where the least is asked for, and 0 elsewhere. ``held`` are the
    requests that all its engines run and hold at once, where a person says how many there must be,
    and 0 elsewhere; of a shape that holds too few ``settings`` have the largest batch that it
    holds.
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
    held: int = 0
    parts: tuple[Evaluation, ...] = ()

    def of_group(self, group: tuple[int, ...]) -> Evaluation:
        """What one of the shape's groups runs."""
        return next((part for part in self.parts if group in part.shape.groups), self)

    @property
    def serves(self) -> bool:
        """Whether it serves, though perhaps fewer requests at once than were asked for."""
        return self.fits or self.held > 0

    @property
    def worth(self) -> tuple[float, int, int, float]:
        """What clients get: images as large as was asked, the context, then the goal's value.

        A promise comes before speed, so that none is smaller where there is more memory. Memory
        comes between them where the least is asked for.
        """
        return (self.served, self.settings.session_len, -self.footprint, self.score)

    @property
    def rank(self) -> tuple[float, ...]:
        """What is compared: what clients get, without queues where that costs nothing, tokens.

        Last the larger prefill, then fewer shards.
        """
        shape = self.shape
        return (
            *self.worth, not self.queues, self.kv_tokens, shape.max_prefill_token_num, -shape.tp
        )  # fmt: skip

    def candidate(self, why_not: str) -> Candidate:
        """The row of ``considered``."""
        kept = ("max_prefill_token_num", "max_batch_size", "session_len", "cache_max_entry_count")
        settings: dict[str, Any] = {name: getattr(self.settings, name) for name in kept}
        if self.parts:
            each = [self.of_group(group).settings for group in self.shape.groups]
            settings["by_group"] = [{name: getattr(one, name) for name in kept} for one in each]
        if self.shape.limit is not None:
            settings["limit"] = self.shape.limit
        return Candidate(
            engine=self.engine,
            tp=self.shape.tp,
            replicas=self.shape.replicas,
            groups=self.shape.groups,
            settings=settings,
            fits=self.fits,
            kv_tokens=self.kv_tokens,
            score=self.score,
            why_not=why_not,
        )


def evaluate(  # noqa: PLR0913 - all that an evaluation depends on
    request: ResolvedRequest,
    shape: Shape,
    dtype: str,
    vision_load: VisionLoad,
    requested_load: VisionLoad,
    engine: Engine,
    memo: Memo | None = None,
) -> Evaluation:
    """Size the context and the ratio of a shape, and score what comes out."""
    sizer = Sizer(request, shape, dtype, vision_load, engine, memo or Memo())
    wanted = ceil(shape.requests(request.promised_requests))
    sizer, session_len, wants_cache = _sized(sizer, requested_load, wanted)
    settings, outcome = sizer.settings(session_len), sizer.outcome(session_len)
    held, lacking = wanted, 0
    if request.promised_requests is not None:
        held, lacking = (
            sizer.held(outcome, session_len),
            sizer.lacking(outcome, session_len, wanted),
        )
    if outcome.ratio is not None:
        settings = replace(settings, cache_max_entry_count=outcome.ratio)
    evaluation = Evaluation(
        engine=engine.name,
        shape=sizer.shape,
        settings=settings,
        vision_load=vision_load,
        kv_tokens=outcome.kv_tokens,
        fits=not outcome.short and held >= wanted,
        served=share_served(vision_load, requested_load),
        short=outcome.short or lacking,
        footprint=sizer.footprint(settings) if request.least else 0,
        held=0 if request.promised_requests is None else held * shape.replicas,
    )
    if not evaluation.fits:
        return evaluation
    at_once = sizer.shape.requests(request.workload.concurrency)
    wants_cache |= outcome.kv_tokens < at_once * request_tokens(requested_load)

    def speeds(in_flight: float) -> tuple[Speed, ...]:
        tokens = outcome.kv_tokens
        return tuple(
            sizer.speed(settings, gpus, requested_load, tokens, in_flight) for gpus in sizer.groups
        )

    evaluation = replace(evaluation, speeds=speeds(at_once), wants_cache=wants_cache)
    if request.workload.goal == "latency":
        alone = speeds(1.0) if request.workload.concurrency is None else evaluation.speeds
        slowest = max(speed.seconds_per_request for speed in alone)
        evaluation = replace(evaluation, seconds_per_answer=slowest)
    return scored(request, evaluation)


def _sized(sizer: Sizer, requested_load: VisionLoad, wanted: int) -> tuple[Sizer, int, bool]:
    """The shape with its batch, its context, and whether it wants more cache.

    Args:
        sizer: of the shape.
        requested_load: the workload's images.
        wanted: requests that each engine must hold at once, where a person says how many.
    """
    request, memo, key = sizer.request, sizer.memo, sizer.key
    if key not in memo.sized:
        session_len, batch, wants_cache = sizer.session_len(), None, False
        given = request.workload.concurrency is not None or sizer.shape.at_once is not None
        if not given and not request.least:
            best, wants_cache = with_best_batch(sizer, session_len, requested_load)
            batch = best.settings(session_len).max_batch_size
        elif request.promised_requests is not None and "max_batch_size" not in request.fixed:
            held = sizer.held(sizer.outcome(session_len), session_len)
            batch = most_held(sizer, wanted) or None if held < wanted else None
            session_len = session_len if batch is None else sizer.with_batch(batch).session_len()
        memo.sized[key] = session_len, batch, wants_cache
    session_len, batch, wants_cache = memo.sized[key]
    return sizer if batch is None else sizer.with_batch(batch), session_len, wants_cache


def explain(request: ResolvedRequest, evaluation: Evaluation, dtype: str, engine: Engine) -> str:
    """Why a shape does not serve, in words; empty where it does."""
    if evaluation.fits:
        return ""
    if evaluation.serves:
        return too_few(request, evaluation)
    if evaluation.parts:
        worst = max(evaluation.parts, key=lambda part: part.short)
        return explain(request, worst, dtype, engine)
    if excess_tokens(request, evaluation.vision_load):
        return too_long(request, evaluation.vision_load)
    sizer = Sizer(request, evaluation.shape, dtype, evaluation.vision_load, engine, Memo())
    accounts = sizer.named(evaluation.settings)
    ratio = sizer.ratio(accounts)
    if ratio is None:
        outcomes = [outcome_without_cache(account) for account in accounts]
    else:
        outcomes = [outcome_at(account, ratio) for account in accounts]
    bad = [outcome for outcome in outcomes if outcome.kind != "serves"]
    if bad:
        return max(bad, key=lambda outcome: outcome.missing).text
    return (
        f"the cache holds {evaluation.kv_tokens} tokens, one request needs {sizer.needed_tokens()}"
    )


def too_few(request: ResolvedRequest, evaluation: Evaluation) -> str:
    """How many of the requests at once a shape holds that serves, in words."""
    wanted, held, settings = request.promised_requests, evaluation.held, evaluation.settings
    size = counted_tokens(evaluation.vision_load, settings.session_len)
    if not evaluation.short and "max_batch_size" in request.fixed:
        return f"max_batch_size {settings.max_batch_size} runs {held:,} of {wanted:,} at once"
    each = "" if evaluation.parts else on_each_gpu(sum(map(len, evaluation.shape.groups)))
    return (
        f"the cache holds {held:,} of {wanted:,} requests of {size:,} tokens,"
        f" {format_bytes(evaluation.short)} short{each}"
    )


def too_long(request: ResolvedRequest, vision_load: VisionLoad) -> str:
    """Why the images of a request do not go with the context, in words."""
    count = vision_load.images_per_request
    images = "one image of the largest size is" if count == 1 else ""
    images = images or f"{count:,} images of the largest size are"
    return (
        f"{images} {vision_load.tokens_per_request:,} tokens, which do not"
        f" fit a context of {most_context(request):,} with text beside them"
    )


def share_served(vision_load: VisionLoad, requested_load: VisionLoad) -> float:
    """The share of the vision units asked for that is served."""
    units = requested_load.units_per_request
    return vision_load.units_per_request / units if units else 1.0


def scored(request: ResolvedRequest, evaluation: Evaluation) -> Evaluation:
    """The same with the goal's value, and whether images queue for it."""
    goal, speeds = request.workload.goal, evaluation.speeds
    if goal == "throughput":
        score = sum(speed.requests_per_second for speed in speeds)
    elif goal == "latency":
        score = 1 / evaluation.seconds_per_answer
    else:
        score = float(evaluation.kv_tokens)
    return replace(
        evaluation,
        score=float(f"{score:.{_DIGITS}g}"),
        queues=evaluation.shape.units_per_forward is not None and not request.workload.queue_images,
    )
