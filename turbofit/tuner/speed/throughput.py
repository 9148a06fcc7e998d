"""The forecast of speed: what ranks replicas against shards. An estimate, and said to be one.

A decode step reads the weights, and the keys and values of all that run; prefill and vision are
FLOPs; every layer reduces twice over the group's slowest link and launches its kernels. Prefills
and steps share the card in turn. The cache bounds how many requests run together; the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from turbofit.core.machine import Gpu, Machine, Measured
from turbofit.core.model import Model
from turbofit.core.plan import Settings, Throughput
from turbofit.core.struct import Struct
from turbofit.memory.engine import Engine
from turbofit.memory.vision_load import VisionLoad
from turbofit.tuner.speed.all_reduce import AllReduce, all_reduce_of
from turbofit.tuner.speed.rates import GpuRates, Rates, card_of, rates
from turbofit.tuner.speed.work import StepWork, vision_seconds, work_of

__all__ = ["Speed", "group_speed", "request_tokens", "speed_of", "total"]


class Speed(Struct):
    """One group's forecast, with ``waiting`` of its requests beyond those that run together.

    ``prefill`` is one request's, ``step`` one token of all that run; of it ``reduce`` is spent on
    links. Seconds. All improve with a larger cache, or stay.
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


def group_speed(  # noqa: PLR0913 - all that a speed depends on
    model: Model,
    settings: Settings,
    machine: Machine,
    gpus: Sequence[Gpu],
    requested_load: VisionLoad,
    kv_tokens: int,
    engine: Engine,
    at_once: float | None = None,
) -> Speed:
    """The forecast of one group for the workload's request.

    Args:
        model: the checkpoint.
        settings: the engine's options.
        machine: for the links.
        gpus: the group.
        requested_load: the workload's vision load, before any limit was lowered for it.
        kv_tokens: what the cache holds; bounds the requests that run together.
        engine: the engine generation's figures.
        at_once: average requests in flight on this replica (8 requests over 7 replicas: 8/7).
            None: ``max_batch_size``.
    """
    figures = rates()
    tokens = request_tokens(requested_load)
    in_flight = float(settings.max_batch_size if at_once is None else at_once)
    return speed_of(
        work_of(model, settings, engine),
        card_of(gpus, figures, machine.measured),
        all_reduce_of(machine, gpus, figures),
        figures,
        prompt=tokens - figures.output_tokens,
        output=figures.output_tokens,
        at_once=in_flight,
        running=min(in_flight, settings.max_batch_size, max(1, kv_tokens // tokens)),
        chunk=settings.max_prefill_token_num,
        requested_load=requested_load,
    )


def speed_of(  # noqa: PLR0913 - all that a speed depends on
    work: StepWork,
    card: GpuRates,
    reduce: AllReduce,
    figures: Rates,
    *,
    prompt: int,
    output: int,
    at_once: float,
    running: float,
    chunk: int,
    requested_load: VisionLoad,
) -> Speed:
    """The forecast of one engine under a closed load.

    Args:
        work: the model's, of one rank.
        card: what a rank's card sustains.
        reduce: the group's all-reduce.
        figures: the constants.
        prompt: tokens of a prompt, images included.
        output: tokens of an answer.
        at_once: requests that are there at any time.
        running: those of them that run together; below one the engine is idle in between.
        chunk: tokens of one prefill pass.
        requested_load: images of a request.
    """
    passes = -(-prompt // chunk)
    prefill = (prompt * work.token_flops + prompt**2 / 2 * work.pair_flops) / card.flops
    prefill = max(prefill, work.read_bytes(prompt) / card.bandwidth)
    prefill += vision_seconds(work, requested_load, passes, card.flops)
    # As if in one pass: more of them launch again, a percent at most, which must not outweigh the
    # cache that a smaller prefill leaves. The forecast is that much high.
    prefill += 2 * work.layers * reduce.seconds(prompt * work.hidden_bytes)
    prefill += work.layers * figures.layer_seconds + figures.step_seconds

    context, batch = prompt + output / 2, max(1.0, running)
    read = work.read_bytes(batch) + batch * context * work.kv_bytes
    spent = 2 * work.layers * reduce.seconds(batch * work.hidden_bytes)
    step = max(read / card.bandwidth, batch * work.token_flops / card.flops)
    step += spent + work.layers * figures.layer_seconds + figures.step_seconds

    rate = min(1.0, running) * batch / (batch * prefill + output * step)
    return Speed(
        requests_per_second=rate,
        seconds_per_request=at_once / rate,
        seconds_to_first_token=prefill + step + (at_once - running) / rate,
        running=running,
        prefill=prefill,
        step=step,
        reduce=spent,
    )


def total(speeds: Sequence[Speed], measured: Measured | None = None) -> Throughput:
    """The forecast over all replicas; ``measured`` is what it rests on beside the constants."""
    figures = rates()
    rests = "rates assumed, not measured"
    if measured is not None:
        rests = f"cards and links as measured here with torch {measured.torch}, the rest assumed"
    rate = sum(speed.requests_per_second for speed in speeds)
    return Throughput(
        basis=(
            f"estimate: {figures.text_tokens} text tokens beside the workload's images, "
            f"{figures.output_tokens} answered; {rests}"
        ),
        requests_per_second=round(rate, 4),
        output_tokens_per_second=round(rate * figures.output_tokens, 1),
        concurrent_requests=round(sum(speed.running for speed in speeds)),
        seconds_to_first_token=round(max(speed.seconds_to_first_token for speed in speeds), 3),
    )
