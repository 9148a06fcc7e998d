"""Evaluates one shape: whether it fits, the tokens that it holds, and its rank.

Engines on unequal cards form sets of equal groups behind one gateway: clients get one image limit
and one context, which the weakest set determines. Each set has its own cache ratio, prefill, batch
and share of the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import ceil, inf

from msgspec.structs import replace

from turbofit.core.plan import Goal
from turbofit.planning.resolved_request import ResolvedRequest
from turbofit.planning.search.shapes import (
    Evaluation,
    Shape,
    prefill_sizes,
    rounded,
)
from turbofit.planning.search.sizing import (
    Groups,
    SearchState,
    Sizer,
    best_batch,
    client_batch,
    held_by,
    most_held,
)
from turbofit.planning.speed import Speed, request_tokens

#: The least number of parts into which `share_out` divides the requests.
_SHARES = 32
#: The least number of these parts for each engine.
_EACH = 4
#: A rate that grows by a smaller share counts as constant.
_GROWS = 1e-9
#: Where images queue, the requests a second that clients who state no length get, as a share of
#: those of clients who state one: the mean of 13 pairs by the clock (docs/speed.md). To wait costs
#: nothing; but a request without a length reserves the longest answer that it may have.
_QUEUED_WORTH = 0.95
#: A set of equal engines: their number, and one engine's speed as a function of its requests.
Set = tuple[int, Callable[[float], Speed]]


def evaluate(state: SearchState, shape: Shape) -> Evaluation:
    """Size a shape, and forecast its speed if it fits."""
    unequal = _Unequal(state, shape)
    if len(unequal.sets) > 1:
        return unequal.evaluate()
    wanted = ceil(shape.requests(state.request.promised_requests))
    sizer, session_len, wants_cache = _sized(Sizer(state, shape).safe())
    evaluation = _held(sizer, session_len, wanted)
    if not evaluation.fits:
        return evaluation
    return _with_forecasts(sizer, evaluation, wants_cache=wants_cache)


def with_client_rows(state: SearchState, evaluation: Evaluation) -> Evaluation:
    """Return a shape that fits with the batch for clients as they come (`client_batch`).

    A batch that follows from the person's own options is kept.
    """
    request = state.request
    given = request.workload.concurrency is not None or "max_batch_size" in request.engine_options
    if given or request.least or not evaluation.fits:
        return evaluation
    if evaluation.joined:
        parts = [with_client_rows(state, part) for part in evaluation.joined]
        return _Unequal(state, evaluation.shape).whole(parts)
    sizer = Sizer(state, evaluation.shape)
    batch = client_batch(sizer, evaluation)
    if batch == evaluation.settings.max_batch_size:
        return evaluation
    larger = sizer.with_batch(batch)
    sized = _held(larger, evaluation.settings.session_len, wanted=0)
    return _with_forecasts(larger, sized, wants_cache=evaluation.wants_cache)


def _held(sizer: Sizer, session_len: int, wanted: int) -> Evaluation:
    """Evaluate a shape by the requests that its caches hold.

    If a number of requests is promised, each group must hold ``wanted`` requests.
    """
    request, sized = sizer.request, sizer.evaluation(session_len)
    units = sizer.state.wished_load.units_per_request
    evaluation = replace(
        sized,
        served=sized.vision_load.units_per_request / units if units else 1.0,
        footprint=sizer.footprint(sized.settings) if request.least else 0,
    )
    if request.promised_requests is None:
        return evaluation
    held_requests, limit = held_by(sized), sizer.largest_batch(sized.settings)
    # If a fault of the engine limits the batch, no memory is missing for more requests.
    kept = wanted if limit is None else min(wanted, limit)
    return replace(
        evaluation,
        fits=sized.fits and held_requests >= wanted,
        short=sized.short or sizer.lacking(sized.kv_tokens, session_len, kept),
        held_requests=held_requests * sizer.shape.replicas,
    )


def _with_forecasts(sizer: Sizer, evaluation: Evaluation, *, wants_cache: bool) -> Evaluation:
    """Add the forecast of each group, and the score, to a fitting shape."""
    request, tokens, settings = sizer.request, evaluation.kv_tokens, evaluation.settings
    at_once = sizer.shape.requests(request.workload.concurrency)
    wants_cache |= tokens < at_once * request_tokens(sizer.state.requested_load)
    at_once = min(at_once, max(1, held_by(evaluation)))  # with a larger batch the others wait
    curves = [partial(sizer.speed, settings, gpus, tokens) for gpus in sizer.groups]
    speeds = tuple(speed(at_once) for speed in curves)
    evaluation = replace(evaluation, speeds=speeds, wants_cache=wants_cache)
    if request.workload.goal == "latency":
        # Without a given number of requests, an engine answers one request at a time.
        alone = speeds if request.workload.concurrency else [speed(1.0) for speed in curves]
        slowest = max(speed.seconds_per_request for speed in alone)
        evaluation = replace(evaluation, seconds_per_answer=slowest)
    plain = sum(speed(at_once, plain=True).requests_per_second for speed in curves)
    return _scored(request, replace(evaluation, ranked=plain))


def _sized(sizer: Sizer) -> tuple[Sizer, int, bool]:
    """Return the sizer with its best batch, the context, and whether more cache would be of use.

    The context is in tokens. If requests are promised, the batch is the number of promised requests
    that the cache holds.
    """
    request = sizer.request
    wanted = ceil(sizer.shape.requests(request.workload.concurrency))
    session_len, batch, wants_cache = sizer.session_len(), None, False
    given = request.workload.concurrency is not None or sizer.shape.at_once is not None
    if not given and not request.least:
        batch, wants_cache = best_batch(sizer, session_len)
    elif request.promised_requests is not None and "max_batch_size" not in request.engine_options:
        # If the cache holds fewer requests than are wanted, the batch is what the cache holds.
        held_requests = held_by(sizer.evaluation(session_len))
        batch = most_held(sizer, wanted) or None if held_requests < wanted else None
        session_len = session_len if batch is None else sizer.with_batch(batch).session_len()
    return sizer if batch is None else sizer.with_batch(batch), session_len, wants_cache


def _scored(request: ResolvedRequest, evaluation: Evaluation) -> Evaluation:
    """Add the goal's score, and whether images queue, to an evaluation."""
    goal, speeds = request.workload.goal, evaluation.speeds
    score, ranked = float(evaluation.kv_tokens), float(evaluation.kv_tokens)
    if goal == "throughput":
        score, ranked = sum(speed.requests_per_second for speed in speeds), evaluation.ranked
    elif goal == "latency":
        score = ranked = 1 / evaluation.seconds_per_answer
    queues = evaluation.shape.units_per_forward is not None and not request.workload.queue_images
    if queues and goal != "context":
        ranked *= _QUEUED_WORTH
    return replace(evaluation, score=rounded(score), ranked=ranked, queues=queues)


class _Unequal:
    """Evaluates unequal groups: first each set of equal groups alone, then all sets together.

    All sets together promise one context: the longest that each of them holds.
    """

    def __init__(self, state: SearchState, shape: Shape) -> None:
        self.state, self.request, self.shape = state, state.request, shape
        self.sets = state.alike(shape.groups)

    def evaluate(self) -> Evaluation:
        """Return the better of two evaluations: equal shares of requests, or shares by the goal.

        Without a given number of requests, each engine has its best batch.
        """
        requests, goal = self.request.workload.concurrency, self.request.workload.goal
        counts = [len(groups) for groups in self.sets]
        even: Sequence[float | None] = [None] * len(counts)
        if requests is not None:
            even = self._held_shares(lambda most: evenly(counts, requests, most))
        alone = [self._best(*pair, None) for pair in zip(self.sets, even, strict=True)]
        if not all(part.fits for part in alone):
            return self.whole(alone)
        promised = min(part.settings.session_len for part in alone)
        if requests is None:  # each engine has the best batch for its card
            return self.whole(self._agreed(even, promised))
        curves = list(zip(counts, map(self._curve, alone), strict=True))
        weighed = self._held_shares(lambda most: share_out(curves, requests, goal, most))
        wholes = [self.whole(self._agreed(shares, promised)) for shares in (even, weighed)]
        return max(wholes, key=lambda whole: (whole.fits, whole.rank))

    def _held_shares(self, shared: Callable[[Sequence[float]], list[float]]) -> list[float]:
        """Return for each set the number of requests on one engine.

        ``shared`` divides the requests; its argument has the largest number for one engine of each
        set. If requests are promised, this number is lowered to what the engine's cache holds,
        until each cache holds its share. If all caches together hold fewer than all requests, the
        other requests are left out.
        """
        most = [inf] * len(self.sets)
        shares = shared(most)
        while self.request.promised_requests is not None:
            parts = [self._best(*pair, None) for pair in zip(self.sets, shares, strict=True)]
            held = [part.held_requests / len(part.shape.groups) for part in parts]
            rows = list(zip(held, shares, most, strict=True))
            if all(holds >= share for holds, share, _ in rows):
                break
            most = [holds if holds < share else bound for holds, share, bound in rows]
            shares = shared(most)
        return shares

    def _agreed(self, shares: Sequence[float | None], promised: int) -> list[Evaluation]:
        """Evaluate the sets with these shares, at the longest context that all of them hold."""
        while True:
            pairs = zip(self.sets, shares, strict=True)
            parts = [self._best(groups, share, promised) for groups, share in pairs]
            least = min(part.settings.session_len for part in parts)
            if least >= promised:
                return parts
            promised = least

    def _best(self, groups: Groups, share: float | None, promised: int | None) -> Evaluation:
        """Evaluate one set with its best prefill, preferably with the promised context."""

        def part_order(part: Evaluation) -> tuple[object, ...]:
            if part.fits:
                return (1, part.settings.session_len >= (promised or 0), *part.rank)
            return (0, part.held_requests, -part.short, part.shape.max_prefill_token_num)

        part = replace(
            self.shape, tp=len(groups[0]), groups=groups, at_once=share, promised=promised
        )

        def best() -> Evaluation:
            sizes = prefill_sizes(self.request, self.state.engine)
            shapes = [replace(part, max_prefill_token_num=size) for size in sizes]
            return max((evaluate(self.state, shape) for shape in shapes), key=part_order)

        return self.state.once(("set", part), best)  # many shapes contain the same set

    def _curve(self, part: Evaluation) -> Callable[[float], Speed]:
        """Return a function from a group's requests to its speed, with the cache of ``part``."""
        sizer = Sizer(self.state, part.shape)

        def speed(in_flight: float) -> Speed:
            settings = part.settings
            if "max_batch_size" not in self.request.engine_options:
                settings = replace(settings, max_batch_size=max(1, ceil(in_flight)))
            return sizer.speed(settings, sizer.groups[0], part.kv_tokens, in_flight)

        return speed

    def whole(self, parts: Sequence[Evaluation]) -> Evaluation:
        """Join the sets to one evaluation of the whole shape, with a forecast if the shape fits.

        Clients may reach every engine, so settings (with the prefill size) and KV tokens are those
        of the weakest set: it lacks the most memory, or holds the fewest tokens. The shape's ``tp``
        is that of its largest group, as `shapes` writes it.
        """
        wanted = self.request.promised_requests or 0
        held_requests = sum(part.held_requests for part in parts)
        weakest = min(parts, key=lambda part: (part.fits, -part.short, part.kv_tokens))
        settings = weakest.settings
        widest = max(part.shape.tp for part in parts)
        prefill = settings.max_prefill_token_num
        evaluation = Evaluation(
            engine=weakest.engine,
            shape=replace(self.shape, tp=widest, max_prefill_token_num=prefill),
            settings=settings,
            vision_load=weakest.vision_load,
            kv_tokens=weakest.kv_tokens,
            fits=all(part.fits for part in parts) and held_requests >= wanted,
            served=weakest.served,
            short=max(part.short for part in parts),
            footprint=sum(part.footprint for part in parts),
            held_requests=held_requests if all(part.serves for part in parts) else 0,
            joined=tuple(parts),
        )
        if not evaluation.fits:
            tokens = sum(part.kv_tokens * part.shape.replicas for part in parts)
            sizer = Sizer(self.state, parts[0].shape)
            short = evaluation.short or sizer.lacking(tokens, settings.session_len, wanted)
            return replace(evaluation, short=short)
        return self._with_forecasts(parts, evaluation)

    def _with_forecasts(self, parts: Sequence[Evaluation], whole: Evaluation) -> Evaluation:
        """Add each group's forecast, in the shape's order, and the score to the whole."""
        by_group = {
            group: speed
            for part in parts
            for group, speed in zip(part.shape.groups, part.speeds, strict=True)
        }
        whole = replace(
            whole,
            speeds=tuple(by_group[group] for group in self.shape.groups),
            seconds_per_answer=max(part.seconds_per_answer for part in parts),
            ranked=sum(part.ranked for part in parts),
        )
        return _scored(self.request, whole)


def evenly(counts: Sequence[int], requests: float, most: Sequence[float]) -> list[float]:
    """Divide requests over the engines of each set, up to a bound.

    Returns the requests for one engine of each set. ``counts`` has the number of engines of each
    set, ``most`` the largest number of requests for one of them.
    """
    not_full, left = dict(enumerate(counts)), requests
    while not_full:
        level = left / sum(not_full.values())
        full = [i for i in not_full if most[i] < level]
        if not full:
            return [level if i in not_full else bound for i, bound in enumerate(most)]
        left -= sum(not_full.pop(i) * most[i] for i in full)
    return list(most)


def share_out(
    sets: Sequence[Set], concurrency: int, goal: Goal, most: Sequence[float] = ()
) -> list[float]:
    """Divide requests over the sets: return the average in flight on each engine of each set.

    The requests are divided into small parts. Each part goes to the set for which the goal gains
    most (``context`` counts as ``throughput``); with equal gains, to the earlier set. Every engine
    gets some. ``most`` is as in :func:`evenly`; empty: no bounds.
    """
    counts = [count for count, _ in sets]
    engines = sum(counts)
    parts = max(_SHARES, _EACH * engines)
    bounds, part = most or [inf] * len(sets), concurrency / parts
    shares, speeds = [min(part, bound) for bound in bounds], [cache(speed) for _, speed in sets]
    steps = [part / count for count in counts]

    def has_room(place: int) -> bool:
        return shares[place] + steps[place] <= bounds[place]

    def next_gain(place: int) -> tuple[float, float]:
        """Return a sort key: what the set at this place gains from the next part of requests.

        The key is the additional requests a second, then the negative seconds of an answer.
        """
        share, speed = shares[place], speeds[place]
        now, more = speed(share), speed(share + steps[place])
        before, after = now.requests_per_second, more.requests_per_second
        grows = goal != "latency" and after > before * (1 + _GROWS)
        gain = (after - before) * sets[place][0] if grows else 0.0
        return gain, -more.seconds_per_request

    for _ in range(parts - engines):  # each engine has one part already
        with_room = list(filter(has_room, range(len(sets))))
        if not with_room:
            break
        best = max(with_room, key=next_gain)
        shares[best] += steps[best]
    if all(map(has_room, range(len(sets)))):
        return shares
    # Some sets are full: the requests that are left are divided over the room of all sets.
    left = concurrency - sum(count * share for count, share in zip(counts, shares, strict=True))
    room = [bound - share for bound, share in zip(bounds, shares, strict=True)]
    more = evenly(counts, left, room)
    return [share + added for share, added in zip(shares, more, strict=True)]
