"""The forecast of speed that ranks shapes: an estimate, and plans say so.

A decode step reads the weights or computes, whichever is slower, and reads the keys and values of
all that run; prefill and vision are FLOPs; every layer reduces twice over the group's slowest link.
Prefills and steps share the card in turn. Of more requests than the cache holds some are evicted
and begin again. `bench/speed` compares it with published figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from math import exp, inf, log2

import msgspec
from msgspec.structs import astuple, replace

from turbofit.core.machine import Gpu, Link, Machine, Measured
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct, known
from turbofit.memory.account import NO_IMAGES, Engine, VisionLoad
from turbofit.tuner.tower import BEFORE, Tower, tower_of

#: What a card gives that neither NVML nor a preset knows: a slow one, so the forecast is low.
_UNKNOWN_BANDWIDTH = 200 * 10**9
_UNKNOWN_FLOPS = 20 * 10**12


class Rates(Struct):
    """The constants of `presets/engines/throughput.yaml`: seconds, bytes/s, tokens and shares."""

    memory_efficiency: float
    compute_efficiency: float
    vision_efficiency: float
    vision_attention_efficiency: float
    pixel_seconds: float
    kernel_seconds: float
    layer_seconds: float
    step_seconds: float
    request_seconds: float
    recomputed_share: float
    host_bandwidth: float
    host_factor: float
    host_latency: float
    across_factor: float
    bridge_ranks: int
    pcie_bandwidth: float
    pcie_latency: float
    nvlink_efficiency: float
    nvlink_latency: float
    text_tokens: int
    output_tokens: int
    tile_source_seconds: float
    tile_prepared_seconds: float
    tile_float_seconds: float
    processor_source_seconds: float
    processor_prepared_seconds: float
    queued_share: float


#: Shares of a card's peak that a large copy and a large product reach: a measured card's figures
#: are these, where the efficiencies are of the peak.
_COPY_SHARE = 0.9
_PRODUCT_SHARE = 0.75


class GpuRates(Struct):
    """What the slowest card of a group sustains: bytes/s of memory, FLOP/s of 16-bit products.

    A vision tower's products and its attention have rates of their own.
    """

    bandwidth: float
    flops: float
    vision_flops: float
    vision_attention_flops: float


@cache
def rates(priors: tuple[str, ...] = ()) -> Rates:
    """The constants of the presets; those of ``priors`` as before a bench's fit."""
    entries = load_yaml(preset_path("engines", "throughput"))
    values = {
        name: entry.get("prior" if name in priors else "value", entry["value"])
        for name, entry in entries.items()
    }
    return msgspec.convert(values, Rates)


def card_of(gpus: Sequence[Gpu], figures: Rates, measured: Measured | None = None) -> GpuRates:
    """What the slowest of these cards sustains; of a measured card the measured figures count."""
    measured_cards = {card.index: card for card in measured.cards} if measured else {}

    def peak(gpu: Gpu) -> tuple[float, float]:
        if (card := measured_cards.get(gpu.index)) is not None:
            return card.bandwidth / _COPY_SHARE, card.flops / _PRODUCT_SHARE
        bandwidth = known(gpu.memory_bandwidth, _UNKNOWN_BANDWIDTH)
        return bandwidth, known(gpu.dense_flops, _UNKNOWN_FLOPS)

    peaks = [peak(gpu) for gpu in gpus]
    flops = min(flops for _, flops in peaks)
    return GpuRates(
        bandwidth=min(bandwidth for bandwidth, _ in peaks) * figures.memory_efficiency,
        flops=flops * figures.compute_efficiency,
        vision_flops=flops * figures.vision_efficiency,
        vision_attention_flops=flops * figures.vision_attention_efficiency,
    )


class StepWork(Struct):
    """One model in one shape; all of one rank unless the name says otherwise.

    ``weights`` are bytes that a decode step reads whatever its batch, ``experts`` those of routed
    experts, of which a token takes the share ``routed``. ``token_flops`` and ``pair_flops`` are of
    one token through the layers, and of its attention to one other. ``prompt_tokens`` of settings
    are those that a forward reads.
    """

    layers: int
    hidden_bytes: int
    weights: float
    experts: float
    routed: float
    token_flops: float
    pair_flops: float
    kv_bytes: float
    prompt_tokens: Callable[[Settings], int]
    tower: Tower = Tower()

    def read_bytes(self, batch: float) -> float:
        """Bytes of weights that one step reads: more experts are met, the more tokens there are."""
        return self.weights + self.experts * float(1 - (1 - self.routed) ** batch)


def work_of(model: Model, settings: Settings, engine: Engine) -> StepWork:
    """The work of a model; of the settings ``tp`` counts, and what sizes a cached token."""
    text, tp, moe = model.text, settings.tp, model.text.moe
    held, cache = engine.weights(model, tp), engine.cache(model, settings)
    routed = share = 0.0
    if moe is not None:
        routed = moe.experts_per_token / moe.experts
        of_experts = 3.0 * text.hidden * moe.intermediate * moe.experts * moe.layers
        share = of_experts / (of_experts + _dense_parameters(model, with_experts=False))
    shards = engine.weights(model, 1).vision / held.vision if held.vision else 1.0
    return StepWork(
        layers=text.layers,
        hidden_bytes=text.hidden * 2,
        weights=held.decode * (1 - share),
        experts=held.decode * share,
        routed=routed,
        token_flops=2 * _dense_parameters(model) / tp,
        pair_flops=4.0 * text.heads * text.head_dim * text.attention_layers / tp,
        kv_bytes=cache.block_bytes / cache.block_tokens,
        prompt_tokens=engine.prompt_tokens,
        tower=tower_of(model, held.vision, shards, encodes_again=engine.encodes_again),
    )


def _dense_parameters(model: Model, *, with_experts: bool = True) -> float:
    """Parameters that one token passes through, without the embedding."""
    text, moe, delta = model.text, model.text.moe, model.text.delta
    gate = text.heads if text.output_gate else 0
    attention = text.hidden * text.head_dim * (2 * text.heads + gate + 2 * text.kv_heads)
    attention *= text.attention_layers
    if delta is not None:
        attention += delta.layers * text.hidden * (delta.channels + 2 * delta.values)
    mlp = 3.0 * text.hidden * text.intermediate * text.layers
    if moe is not None:
        routed = moe.experts_per_token * moe.intermediate if with_experts else 0
        mlp *= 1 - moe.layers / text.layers
        mlp += 3.0 * text.hidden * (routed + moe.shared_intermediate) * moe.layers
    return float(attention + mlp + text.vocab * text.hidden)


class LinkClass(IntEnum):
    """Kinds of link from slow to fast; unread links count as the slowest."""

    ACROSS_HOST = 0
    HOST = 1
    PCIE_PEER = 2
    NVLINK = 3
    ALONE = 4

    @property
    def words(self) -> str:
        return (
            "through host memory across NUMA nodes",
            "through host memory, no peer access",
            "PCIe peer access",
            "NVLink",
            "one GPU",
        )[self]


def group_class(machine: Machine, gpus: Sequence[Gpu]) -> LinkClass:
    return min(map(link_class, _links(machine, gpus)), default=LinkClass.ALONE)


def nvlink_bandwidth(machine: Machine, gpus: Sequence[Gpu]) -> int:
    """Bytes/s in one direction of the slowest NVLink in the group, 0 where there is none."""
    return min((known(link.nvlink_bandwidth, 0) for link in _links(machine, gpus)), default=0)


def _links(machine: Machine, gpus: Sequence[Gpu]) -> list[Link]:
    return [machine.link(a.index, b.index) for k, a in enumerate(gpus) for b in gpus[:k]]


def link_class(link: Link) -> LinkClass:
    if link.nvlinked:
        return LinkClass.NVLINK
    if link.peers:
        return LinkClass.PCIE_PEER
    return LinkClass.ACROSS_HOST if link.ancestor == "system" else LinkClass.HOST


class AllReduce(Struct):
    """An all-reduce of ``ranks`` GPUs.

    ``latency`` is of two ranks in seconds; ``bandwidth`` is what one of two GPUs sends, in bytes/s.
    ``shared_by`` ranks cross one host bridge and take from each other what two of them have.
    """

    ranks: int
    latency: float = 0.0
    bandwidth: float = 1.0
    shared_by: int = 2

    @property
    def launch(self) -> float:
        """Seconds whatever the bytes: the latency, half of it by the tree's depth."""
        return 0.0 if self.ranks == 1 else self.latency * (1 + log2(self.ranks)) / 2

    @property
    def seconds_per_byte(self) -> float:
        if self.ranks == 1:
            return 0.0
        traffic = 2 * (self.ranks - 1) / self.ranks * max(2, min(self.ranks, self.shared_by)) / 2
        return traffic / self.bandwidth

    def seconds(self, size: float) -> float:
        return self.launch + size * self.seconds_per_byte


def all_reduce_of(machine: Machine, gpus: Sequence[Gpu], figures: Rates) -> AllReduce:
    """The all-reduce of a group. Unread links count as the slowest, so the forecast is low."""
    kind, ranks = group_class(machine, gpus), len(gpus)
    if kind == LinkClass.ALONE:
        return AllReduce(ranks=1)
    measured = _measured(machine, gpus)
    if measured is not None:
        return measured
    slot = figures.pcie_bandwidth * min(_pcie_scale(gpu) for gpu in gpus)
    host = min(figures.host_bandwidth, slot * figures.host_factor)
    if kind == LinkClass.NVLINK:
        bandwidth = max(nvlink_bandwidth(machine, gpus) * figures.nvlink_efficiency, host)
        return AllReduce(ranks=ranks, latency=figures.nvlink_latency, bandwidth=bandwidth)
    latency, bandwidth = figures.host_latency, host
    if kind == LinkClass.PCIE_PEER:
        latency, bandwidth = figures.pcie_latency, slot
    elif kind == LinkClass.ACROSS_HOST:
        bandwidth *= figures.across_factor
    shared = figures.bridge_ranks
    return AllReduce(ranks=ranks, latency=latency, bandwidth=bandwidth, shared_by=shared)


def reduce_class(machine: Machine, gpus: Sequence[Gpu]) -> int:
    """Groups of one link class whose measured all-reduces differ by two fifths differ in this."""
    if machine.measured is None or len(gpus) == 1:
        return 0
    return round(2 * log2(all_reduce_of(machine, gpus, rates()).seconds(1 << 20)))


def _measured(machine: Machine, gpus: Sequence[Gpu]) -> AllReduce | None:
    """The group's own all-reduce, else its slowest pair's over one host bridge: a low forecast."""
    if machine.measured is None:
        return None
    indices = frozenset(gpu.index for gpu in gpus)
    by_group: dict[frozenset[int], dict[int, float]] = {}
    for reduce in machine.measured.reduces:
        if reduce.right:
            by_group.setdefault(frozenset(reduce.gpus), {})[reduce.size] = reduce.seconds
    curve = by_group.get(indices)
    if curve is not None and len(curve) > 1:
        return _line(curve, len(gpus), len(gpus))
    pairs = [times for group, times in by_group.items() if group <= indices and len(group) == 2]
    wanted = len(indices) * (len(indices) - 1) // 2
    if len(pairs) < wanted or any(len(times) < 2 for times in pairs):
        return None
    lines = [_line(times, 2, len(gpus)) for times in pairs]
    slowest = max(lines, key=lambda line: line.seconds(1 << 20))
    return replace(slowest, shared_by=len(gpus))


def _line(times: dict[int, float], measured: int, ranks: int) -> AllReduce:
    """An all-reduce of ``ranks``, by the times of two sizes that ``measured`` ranks took."""
    small, large = min(times), max(times)
    slope = max((times[large] - times[small]) / (large - small), 1e-15)
    latency = max(times[small] - slope * small, 0.0) / ((1 + log2(measured)) / 2)
    return AllReduce(ranks=ranks, latency=latency, bandwidth=2 * (measured - 1) / measured / slope)


def _pcie_scale(gpu: Gpu) -> float:
    """The card's PCIe link relative to 3.0 x16; the older where unknown, 0 is no answer."""
    generation, width = known(gpu.pcie.generation, 0) or 3, known(gpu.pcie.width, 0) or 16
    return float(2.0 ** (generation - 3) * width / 16)


#: Answers of one length leave room for more requests than could all end; the more their lengths
#: differ, the sooner evictions begin. Below this there is nothing to tell apart.
_LEAST_ROOM = 0.1
#: Steps of a search for the requests that bring a rate: a thousandth of a batch of 256.
_HALVINGS = 18


class Speed(Struct):
    """One group's forecast.

    ``seconds_to_first_token`` is of a request that comes at any moment while all others are there:
    it waits for the prompt that is being read (no answer ends meanwhile, so few others wait).
    ``alone`` is of one that finds the engine idle. ``running`` requests are in the batch on
    average; ``prefill`` is one request's, ``step`` one token of all that run, ``reduce`` what of it
    is spent on links, each in seconds; ``encodings`` is how often the images of one that comes
    alone are encoded. A larger cache never gives fewer requests a second.
    """

    requests_per_second: float
    seconds_per_request: float
    seconds_to_first_token: float
    alone: float
    running: float
    prefill: float
    step: float
    reduce: float
    encodings: int = 0

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
    """Tokens of the request that verdicts count by: the workload's, as far as a session goes."""
    return min(request_tokens(vision_load), session_len)


class Pace(Struct):
    """Requests a second, seconds of a first token and of a later one; None: nothing is wished."""

    rate: float | None = None
    first_token: float | None = None
    per_token: float | None = None

    def forecast(self, speed_at: Callable[[float], Speed], share: float, most: float) -> Pace:
        """One engine with the fewest requests that bring its ``share``, else with ``most``."""
        low, high = 0.0, most
        wanted = inf if self.rate is None else self.rate * share
        speed = speed_at(most)
        for _ in range(_HALVINGS if speed.requests_per_second > wanted else 0):
            middle = (low + high) / 2
            tried = speed_at(middle)
            if tried.requests_per_second < wanted:
                low = middle
            else:
                high, speed = middle, tried
        first, whole = speed.seconds_to_first_token, speed.seconds_per_request
        per_token = max(speed.step, (whole - first) / rates().output_tokens)
        return Pace(rate=speed.requests_per_second, first_token=first, per_token=per_token)

    def excess(self, forecast: Pace) -> float:
        """By which share the wish that is missed most is missed; 0 where all are kept."""
        both = zip(astuple(self), astuple(forecast), (-1, 1, 1), strict=True)
        missed: list[float] = [
            ((now or 1e-9) / wish) ** sign - 1 for wish, now, sign in both if wish
        ]
        return max(0.0, *missed)


class ClosedLoad(Struct):
    """Requests of one kind, so many of which are there at any time.

    ``prompt`` and ``output`` are tokens of one, images among the prompt's. ``at_once`` may be a
    fraction (8 requests over 7 replicas: 8/7); below one the engine is idle in between.
    ``spread`` is the squared coefficient of variation of an answer's length: 0 where all are as
    long, 1 for an exponential distribution.
    """

    prompt: float
    output: float
    at_once: float
    images: VisionLoad = NO_IMAGES
    spread: float = 0.0


class GroupRates(Struct):
    """What a group's cards and links sustain, and what a model asks of one rank there."""

    work: StepWork
    card: GpuRates
    reduce: AllReduce

    def seconds(
        self, figures: Rates, tokens: float, *, pairs: float = 0.0, cached: float = 0.0
    ) -> float:
        """One forward of so many tokens: products read their weights while they compute.

        ``pairs``: a prompt's token and one that it looks at; ``cached``: tokens whose KV is read.
        """
        work, card = self.work, self.card
        products = max(
            work.read_bytes(tokens) / card.bandwidth, tokens * work.token_flops / card.flops
        )
        attention = pairs * work.pair_flops / card.flops + cached * work.kv_bytes / card.bandwidth
        launches = work.layers * figures.layer_seconds + figures.step_seconds
        return products + attention + self.reduces(tokens) + launches

    @property
    def plain(self) -> GroupRates:
        """The same with a plain tower, which is what a batch is chosen by."""
        return replace(self, work=replace(self.work, tower=self.work.tower.plain))

    def tower_seconds(self, units: float) -> float:
        """Seconds in which an image of so many units is encoded once."""
        tower, card = self.work.tower, self.card
        products = tower.unit_flops * units / card.vision_flops
        return products + tower.attention_flops(units) / card.vision_attention_flops

    def reduces(self, tokens: float) -> float:
        """Seconds on links of a forward of so many tokens; every layer reduces twice."""
        times, reduce = 2 * self.work.layers, self.reduce
        token_reduces = times * reduce.seconds_per_byte * self.work.hidden_bytes
        return times * reduce.launch + tokens * token_reduces


def group_rates(
    model: Model, settings: Settings, machine: Machine, gpus: Sequence[Gpu], engine: Engine
) -> GroupRates:
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

    Where its forwards hold fewer units than the engine's, image requests wait for each other. A
    request that is longer than a session has a shorter prompt.
    """
    figures = rates()
    longest = max(1, settings.session_len - figures.output_tokens)
    load = ClosedLoad(
        prompt=min(requested_load.tokens_per_request + figures.text_tokens, longest),
        output=figures.output_tokens,
        at_once=float(at_once),
        images=requested_load,
    )
    speed = speed_of(group, figures, load, settings, kv_tokens)
    return speed if requested_load.units_per_forward is None else speed.queued()


def speed_of(
    group: GroupRates, figures: Rates, load: ClosedLoad, settings: Settings, kv_tokens: float
) -> Speed:
    """The forecast of one engine under a closed load; ``kv_tokens`` are what its cache holds."""
    work, card, at_once = group.work, group.card, load.at_once
    whole, context = load.prompt + load.output, load.prompt + load.output * (1 + load.spread) / 2
    admitted = min(at_once, settings.max_batch_size)
    room, fitting = max(0.0, whole / context - 1), max(1.0, kv_tokens // whole)
    mean, repeated = crowd_of(admitted, fitting, room, load.output, figures.recomputed_share)
    running = max(1.0, mean)

    # As if in one pass: more launch again, a percent at most, which must not outweigh the cache
    # that a smaller prefill leaves. The forecast is that much high.
    text = group.seconds(figures, load.prompt, pairs=load.prompt**2 / 2)
    step = group.seconds(figures, running, cached=running * context)
    encoding = group.tower_seconds(load.images.units_per_image)
    encodings, cut = _encodings(work, load, settings)
    alone = text + encodings * encoding
    # Answers that end in the same step make room for prompts that are read back to back.
    together = (running - 1) / load.output
    behind = 1 - (1 - exp(-together)) / together if together else 0.0
    images = encoding * (encodings + cut * behind)
    prefill = text + images
    # An evicted request begins again, its images too.
    again = repeated * load.output
    again = again * work.token_flops / card.flops + images * again / whole

    cycle = running * (prefill + again) + load.output * step
    # LMDeploy's event loop runs beside the GPU.
    rate = min(min(1.0, admitted) * running / cycle, 1 / figures.request_seconds)
    others = (running - 1) * (prefill + again) / cycle
    first = prefill + others * (prefill / 2 + prefill * together / 2) + step
    return Speed(
        requests_per_second=rate,
        seconds_per_request=at_once / rate,
        seconds_to_first_token=first + (at_once - mean) / rate,
        alone=alone + group.seconds(figures, 1.0, cached=load.prompt),
        running=mean,
        prefill=prefill,
        step=step,
        reduce=group.reduces(running),
        encodings=encodings,
    )


def _encodings(work: StepWork, load: ClosedLoad, settings: Settings) -> tuple[int, float]:
    """How often a request's images are encoded where it comes alone, and more where prompts wait.

    Prompts that wait are read back to back, so that the edge of a forward cuts some image more
    often; no two are read together that are longer than a context, or whose images queue. A plain
    tower is never asked for more.
    """
    sent, forward, tower = load.images, work.prompt_tokens(settings), work.tower
    images, tokens = sent.images_per_request, sent.tokens_per_request
    alone, context = tower.encodings(BEFORE, tokens, forward, images), settings.session_len
    together = forward < context and 2 * load.prompt <= context and sent.units_per_forward is None
    if not images or not tower.encodes_again or not tower.pair_flops or not together:
        return alone, 0.0
    return alone, max(0.0, images + tokens / forward - alone)


def crowd_of(
    admitted: float, fitting: float, room: float, output: float, recomputed_share: float
) -> tuple[float, float]:
    """Requests that run on average, and the share of its answer that each computes again.

    Fitted to `tests/tuner/simulated_cache.py`.

    Args:
        admitted: requests that the batch lets in.
        fitting: requests whose prompt and whole answer the cache holds, one at least.
        room: by which share more requests fit at their mean length than at their full one.
        output: tokens of an answer: of shorter ones more end in a step, and fewer are evicted.
        recomputed_share: the largest share of an answer that is computed again.
    """
    if admitted <= fitting:
        return admitted, 0.0
    evicting = 1 - exp((1 - admitted / fitting) / max(room, _LEAST_ROOM))
    running = min(admitted, fitting * (1 + room * evicting))
    return running, evicting * recomputed_share / (1 + fitting / output)
