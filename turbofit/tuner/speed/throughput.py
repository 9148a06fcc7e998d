"""The forecast of speed: what ranks replicas against shards. It is an estimate, and plans say so.

A decode step reads the weights or computes, whichever is slower, and reads the keys and values of
all that run; prefill and vision are FLOPs; every layer reduces twice over the group's slowest link
and launches its kernels. Prefills and steps share the card in turn. The cache bounds how many
requests run together: of more, some are evicted and begin again. `bench/speed` compares it with
published figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, exp
from typing import NamedTuple

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine, Measured
from turbofit.core.model import Model
from turbofit.core.plan import Settings, Throughput
from turbofit.core.struct import Struct
from turbofit.memory.account import NO_IMAGES, Engine, VisionLoad
from turbofit.tuner.speed.links import AllReduce, all_reduce_of
from turbofit.tuner.speed.rates import (
    GpuRates,
    Rates,
    StepWork,
    card_of,
    rates,
    vision_seconds,
    work_of,
)

__all__ = [
    "BatchLimits", "ClosedLoad", "Crowd", "GroupRates", "Speed", "counted_tokens", "crowd_of",
    "group_rates", "group_speed", "request_tokens", "speed_of", "total",
]  # fmt: skip

#: Answers of one length leave room for more requests than could all end; the more their lengths
#: differ, the sooner evictions begin. Beyond this there is nothing to tell apart.
_LEAST_ROOM = 0.1


class Speed(Struct):
    """One group's forecast.

    ``running`` requests are in the batch on average; ``prefill`` is one request's, ``step`` one
    token of all that run; of it ``reduce`` is spent on links. Seconds. Requests a second improve
    with a larger cache, or stay.
    """

    requests_per_second: float
    seconds_per_request: float
    seconds_to_first_token: float
    running: float
    prefill: float
    step: float
    reduce: float

    def queued(self) -> Speed:
        """The same where image requests wait for each other's prefill in the gateway."""
        kept = rates().queued_share
        return replace(
            self,
            requests_per_second=self.requests_per_second * kept,
            seconds_per_request=self.seconds_per_request / kept,
            seconds_to_first_token=self.seconds_to_first_token / kept,
        )


def request_tokens(vision_load: VisionLoad) -> int:
    """Tokens of the workload's request: its images, and the assumed text and answer."""
    figures = rates()
    return vision_load.tokens_per_request + figures.text_tokens + figures.output_tokens


def counted_tokens(vision_load: VisionLoad, session_len: int) -> int:
    """Tokens of the request that verdicts count by: the workload's, as far as a session goes.

    Under: a request takes whole blocks of the cache, up to a block less a token more than these.
    """
    return min(request_tokens(vision_load), session_len)


class ClosedLoad(Struct):
    """Requests of one kind, so many of which are there at any time.

    ``prompt`` and ``output`` are tokens of one, images among the prompt's; below one ``at_once``
    the engine is idle in between, and it may be a fraction (8 requests over 7 replicas: 8/7).
    ``images`` are those of one request. ``spread`` is the squared coefficient of variation of an
    answer's length: 0 where all are as long, 1 for lengths of an exponential distribution.
    """

    prompt: float
    output: float
    at_once: float
    images: VisionLoad = NO_IMAGES
    spread: float = 0.0


class BatchLimits(Struct):
    """``max_batch_size``, the tokens that the cache holds, and those of one prefill pass."""

    batch: int
    kv_tokens: float
    chunk: int

    @classmethod
    def of(cls, settings: Settings, kv_tokens: float) -> BatchLimits:
        """Those of an engine with these options."""
        return cls(
            batch=settings.max_batch_size,
            kv_tokens=kv_tokens,
            chunk=settings.max_prefill_token_num,
        )


class GroupRates(Struct):
    """What a group's cards and links sustain, and what a model asks of one rank there."""

    work: StepWork
    card: GpuRates
    reduce: AllReduce

    def seconds(
        self, figures: Rates, tokens: float, *, pairs: float = 0.0, cached: float = 0.0
    ) -> float:
        """One forward of so many tokens.

        A product reads its weights while it computes, and the slower of both counts: few rows are
        bound by memory, many by FLOPs. Attention runs between products and hides behind neither:
        ``pairs`` are those of a token and one that it looks at, where a prompt is computed,
        ``cached`` the tokens whose keys and values are read.
        """
        work, card = self.work, self.card
        products = max(
            work.read_bytes(tokens) / card.bandwidth, tokens * work.token_flops / card.flops
        )
        attention = pairs * work.pair_flops / card.flops + cached * work.kv_bytes / card.bandwidth
        launches = work.layers * figures.layer_seconds + figures.step_seconds
        return products + attention + self.reduces(tokens) + launches

    def reduces(self, tokens: float) -> float:
        """Seconds that a forward of so many tokens spends on links; every layer reduces twice."""
        times, reduce = 2 * self.work.layers, self.reduce
        token_reduces = times * reduce.seconds_per_byte * self.work.hidden_bytes
        return times * reduce.launch + tokens * token_reduces


def group_rates(
    model: Model, settings: Settings, machine: Machine, gpus: Sequence[Gpu], engine: Engine
) -> GroupRates:
    """The rates of one group; of the settings ``tp`` counts, and what sizes a cached token."""
    return GroupRates(
        work=work_of(model, settings, engine),
        card=card_of(gpus, rates(), machine.measured),
        reduce=all_reduce_of(machine, gpus, rates()),
    )


def group_speed(
    group: GroupRates,
    settings: Settings,
    requested_load: VisionLoad,
    kv_tokens: int,
    at_once: float,
) -> Speed:
    """The forecast of one group for the workload's request, as if no limit was lowered for it.

    ``kv_tokens`` are what the cache holds, ``at_once`` the average requests in flight on this
    engine (8 requests over 7 of them: 8/7).
    """
    figures = rates()
    load = ClosedLoad(
        prompt=requested_load.tokens_per_request + figures.text_tokens,
        output=figures.output_tokens,
        at_once=float(at_once),
        images=requested_load,
    )
    return speed_of(group, figures, load, BatchLimits.of(settings, kv_tokens))


def speed_of(group: GroupRates, figures: Rates, load: ClosedLoad, limits: BatchLimits) -> Speed:
    """The forecast of one engine under a closed load, of which so much runs together."""
    work, card, at_once = group.work, group.card, load.at_once
    whole, context = load.prompt + load.output, load.prompt + load.output * (1 + load.spread) / 2
    admitted = min(at_once, limits.batch)
    room, fitting = max(0.0, whole / context - 1), max(1.0, limits.kv_tokens // whole)
    crowd = crowd_of(admitted, fitting, room, load.output, figures.recomputed_share)
    running = max(1.0, crowd.running)

    # As if in one pass: more of them launch again, a percent at most, which must not outweigh the
    # cache that a smaller prefill leaves. The forecast is that much high.
    prefill = group.seconds(figures, load.prompt, pairs=load.prompt**2 / 2)
    images = vision_seconds(work, load.images, ceil(load.prompt / limits.chunk), card.vision_flops)
    prefill += images
    # An evicted request begins again, its images too.
    again = crowd.again * load.output
    again = again * work.token_flops / card.flops + images * again / whole
    step = group.seconds(figures, running, cached=running * context)

    cycle = running * (prefill + again) + load.output * step
    # LMDeploy's event loop runs beside the GPU.
    rate = min(min(1.0, admitted) * running / cycle, 1 / figures.request_seconds)
    # It waits for the prefills of others as often as they take their turns.
    queued = prefill * cycle / (cycle - (running - 1) * (prefill + again))
    return Speed(
        requests_per_second=rate,
        seconds_per_request=at_once / rate,
        seconds_to_first_token=queued + step + (at_once - crowd.running) / rate,
        running=crowd.running,
        prefill=prefill,
        step=step,
        reduce=group.reduces(running),
    )


def total(speeds: Sequence[Speed], measured: Measured | None = None) -> Throughput:
    """The forecast over all replicas; ``measured`` is what it rests on beside the constants."""
    figures = rates()
    rests = "rates assumed, not measured"
    if measured is not None:
        rests = f"cards and links as measured here with torch {measured.torch}, the rest assumed"
    errors = (
        f"median error {figures.median_error:.1%}, p90 {figures.p90_error:.1%} over "
        f"{figures.error_figures} published figures of text models on {figures.error_cards} cards, "
        f"no figure of a vision model is published"
    )
    rate = sum(speed.requests_per_second for speed in speeds)
    return Throughput(
        basis=(
            f"estimate: {figures.text_tokens} text tokens beside the workload's images, "
            f"{figures.output_tokens} answered; {rests}; {errors}"
        ),
        requests_per_second=round(rate, 4),
        output_tokens_per_second=round(rate * figures.output_tokens, 1),
        concurrent_requests=round(sum(speed.running for speed in speeds)),
        seconds_to_first_token=round(max(speed.seconds_to_first_token for speed in speeds), 3),
        median_error=round(figures.median_error, 3),
    )


class Crowd(NamedTuple):
    """Requests that run on average, and the share of its answer that each computes again."""

    running: float
    again: float


def crowd_of(
    admitted: float, fitting: float, room: float, output: float, recomputed_share: float
) -> Crowd:
    """How a cache is shared; fitted to `tests/tuner/speed/simulated_cache.py`.

    Args:
        admitted: requests that the batch lets in.
        fitting: requests whose prompt and whole answer the cache holds, one at least.
        room: by which share more requests fit at their mean length than at their full one.
        output: tokens of an answer. The more requests end while one is answered, the fewer are
            evicted.
        recomputed_share: the largest share of an answer that is computed again.
    """
    if admitted <= fitting:
        return Crowd(admitted, 0.0)
    evicting = 1 - exp((1 - admitted / fitting) / max(room, _LEAST_ROOM))
    running = min(admitted, fitting * (1 + room * evicting))
    return Crowd(running, evicting * recomputed_share / (1 + fitting / output))
