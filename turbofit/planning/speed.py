"""The forecast of speed that ranks shapes; plans call it an estimate.

A decode step reads the weights or computes, whichever is slower, and reads the keys and values of
all running requests. Prefill and vision are counted in FLOPs; every layer has two all-reduces over
the group's slowest link. Prefills and steps take turns on the card. If the cache cannot hold all
requests, some are evicted and start again. `bench/speed` compares the forecast with published
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from math import exp, log2

import msgspec
from msgspec.structs import replace

from turbofit.core.machine import Gpu, Link, Machine, Measured, MeasuredSteps
from turbofit.core.model import Model
from turbofit.core.plan import UNSTATED_ANSWERS, EnginePlan, Plan, Settings
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct, known
from turbofit.memory.account import NO_IMAGES, Engine, VisionLoad
from turbofit.memory.calibrated import rates_shown, timed_for
from turbofit.memory.engines import engine_of
from turbofit.planning.steps import StepRatios, ratio_at, ratios_of
from turbofit.planning.tower import BEFORE, Tower, tower_of

#: The assumed rates of an unknown card: the rates of a slow card, so the forecast is low.
_UNKNOWN_BANDWIDTH = 200 * 10**9
_UNKNOWN_FLOPS = 20 * 10**12
#: The shares of a card's peak that a large copy and a large product reach. A measured rate of a
#: copy or product, divided by its share, gives the peak; the efficiencies in `Rates` are shares of
#: this peak.
_COPY_SHARE = 0.9
_PRODUCT_SHARE = 0.75
#: The forms of a client's requests are told apart if one has fewer requests at once by this share.
_MUCH_FEWER = 0.2
#: The least ``room`` by which `crowd_of` divides: with less room, evictions grow no faster.
_LEAST_ROOM = 0.1


class Rates(Struct):
    """The constants in `presets/engines/throughput.yaml`: seconds, bytes/s, tokens and shares."""

    memory_efficiency: float
    compute_efficiency: float
    kv_int8_efficiency: float
    kv_int4_efficiency: float
    vision_efficiency: float
    vision_attention_efficiency: float
    pixel_seconds: float
    kernel_seconds: float
    layer_seconds: float
    step_seconds: float
    request_seconds: float
    server_seconds: float
    server_token_seconds: float
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
    tile_source_seconds: float
    tile_prepared_seconds: float
    tile_float_seconds: float
    processor_source_seconds: float
    processor_prepared_seconds: float


class GpuRates(Struct):
    """The sustained rates of a group's slowest card: bytes/s of memory, 16-bit FLOP/s.

    Weights have another rate than the cache (keys and values), and a vision tower's products have
    another rate than its attention.
    """

    bandwidth: float
    cache_bandwidth: float
    flops: float
    vision_flops: float
    vision_attention_flops: float


@cache
def rates(priors: tuple[str, ...] = ()) -> Rates:
    """Return the constants of the presets.

    The constants named in ``priors`` have the values that were assumed before constants were fitted
    to figures.
    """
    entries = load_yaml(preset_path("engines", "throughput"))
    values = {
        name: entry.get("prior" if name in priors else "value", entry["value"])
        for name, entry in entries.items()
    }
    return msgspec.convert(values, Rates)


def card_of(gpus: Sequence[Gpu], figures: Rates, measured: Measured | None = None) -> GpuRates:
    """Return the rates of the slowest card, from measured figures or else from presets."""
    measured_cards = {card.index: card for card in measured.cards} if measured else {}

    def peak(gpu: Gpu) -> tuple[float, float]:
        if (card := measured_cards.get(gpu.index)) is not None:
            return card.bandwidth / _COPY_SHARE, card.flops / _PRODUCT_SHARE
        bandwidth = known(gpu.memory_bandwidth, _UNKNOWN_BANDWIDTH)
        return bandwidth, known(gpu.dense_flops, _UNKNOWN_FLOPS)

    peaks = [peak(gpu) for gpu in gpus]
    flops = min(flops for _, flops in peaks)
    bandwidth = min(bandwidth for bandwidth, _ in peaks) * figures.memory_efficiency
    return GpuRates(
        bandwidth=bandwidth,
        cache_bandwidth=bandwidth,
        flops=flops * figures.compute_efficiency,
        vision_flops=flops * figures.vision_efficiency,
        vision_attention_flops=flops * figures.vision_attention_efficiency,
    )


class StepWork(Struct):
    """The work of one forward of a model on one rank.

    ``weights`` are bytes that every decode step reads; ``experts`` are bytes of routed experts; one
    token reads the share ``routed`` of these bytes. ``token_flops`` are FLOPs for one token through
    all layers, ``pair_flops`` for the attention of one token to another. A token's keys and values
    take ``kv_bytes``; reading them in int8 or int4 takes as long as reading ``kv_read_bytes`` in 16
    bits. ``prompt_tokens`` returns how many tokens of prompts one forward reads with some settings.
    """

    layers: int
    hidden_bytes: int
    weights: float
    experts: float
    routed: float
    token_flops: float
    pair_flops: float
    kv_bytes: float
    kv_read_bytes: float
    prompt_tokens: Callable[[Settings], int]
    tower: Tower = Tower()

    def read_bytes(self, batch: float) -> float:
        """Return the bytes of weights that one step reads; more tokens need more experts."""
        return self.weights + self.experts * float(1 - (1 - self.routed) ** batch)


def work_of(model: Model, settings: Settings, engine: Engine) -> StepWork:
    """Return the work of a model on one rank; only ``tp`` and the settings of the cache matter."""
    text, tp, moe = model.text, settings.tp, model.text.moe
    held, cache = engine.weights(model, tp), engine.cache(model, settings)
    kv_bytes = cache.block_bytes / cache.block_tokens
    shares = {8: rates().kv_int8_efficiency, 4: rates().kv_int4_efficiency}
    routed = share = 0.0
    if moe is not None:
        routed = moe.experts_per_token / moe.experts
        of_experts = 3.0 * text.hidden * moe.intermediate * moe.experts * moe.layers
        # The share of the weights that belongs to routed experts.
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
        kv_bytes=kv_bytes,
        kv_read_bytes=kv_bytes / shares.get(settings.quant_policy, 1.0),
        prompt_tokens=engine.prompt_tokens,
        tower=tower_of(model, held.vision, shards, encodes_again=engine.encodes_again),
    )


def _dense_parameters(model: Model, *, with_experts: bool = True) -> float:
    """Return the parameters that one token passes through, without the embedding."""
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
    """The kinds of link from slow to fast; unread links count as the slowest."""

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
    """Return the slowest kind of link between the GPUs."""
    return min(map(link_class, _links(machine, gpus)), default=LinkClass.ALONE)


def nvlink_bandwidth(machine: Machine, gpus: Sequence[Gpu]) -> int:
    """Return the slowest NVLink's bytes/s in one direction in the group, 0 without NVLink."""
    return min((known(link.nvlink_bandwidth, 0) for link in _links(machine, gpus)), default=0)


def _links(machine: Machine, gpus: Sequence[Gpu]) -> list[Link]:
    return [machine.link(a.index, b.index) for k, a in enumerate(gpus) for b in gpus[:k]]


def link_class(link: Link) -> LinkClass:
    """Return the kind of one link."""
    if link.nvlinked:
        return LinkClass.NVLINK
    if link.peers:
        return LinkClass.PCIE_PEER
    return LinkClass.ACROSS_HOST if link.ancestor == "system" else LinkClass.HOST


class AllReduce(Struct):
    """An all-reduce over ``ranks`` GPUs.

    ``latency`` is the seconds of an all-reduce of very few bytes over two GPUs; ``bandwidth`` is
    the bytes/s that one of two GPUs sends. ``shared_by`` ranks share one host bridge, which carries
    the bandwidth of two ranks. For one rank, all seconds are 0.
    """

    ranks: int
    latency: float = 0.0
    bandwidth: float = 1.0
    shared_by: int = 2

    @property
    def launch(self) -> float:
        """The seconds of an all-reduce of very few bytes.

        The seconds are half the latency, plus half the latency for each level of the tree of ranks.
        """
        return self.latency * (1 + log2(self.ranks)) / 2

    @property
    def seconds_per_byte(self) -> float:
        traffic = 2 * (self.ranks - 1) / self.ranks * max(2, min(self.ranks, self.shared_by)) / 2
        return traffic / self.bandwidth

    def seconds(self, size: float) -> float:
        return self.launch + size * self.seconds_per_byte


def all_reduce_of(machine: Machine, gpus: Sequence[Gpu], figures: Rates) -> AllReduce:
    """Return the all-reduce of a group; unread links count as the slowest (a low forecast)."""
    kind, ranks = group_class(machine, gpus), len(gpus)
    if kind == LinkClass.ALONE:
        return AllReduce(ranks=1)
    measured = _measured(machine, gpus)
    if measured is not None:
        return measured
    # The slowest card's PCIe link relative to 3.0 x16; an unknown value, or 0, counts as 3.0 x16.
    slot = figures.pcie_bandwidth * min(
        2.0 ** ((known(gpu.pcie.generation, 0) or 3) - 3) * (known(gpu.pcie.width, 0) or 16) / 16
        for gpu in gpus
    )
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
    """Return a number that is equal for groups whose all-reduces take nearly the same time.

    The next number stands for about two fifths more time. The number is 0 for one GPU, or if
    nothing was measured.
    """
    if machine.measured is None or len(gpus) == 1:
        return 0
    return round(2 * log2(all_reduce_of(machine, gpus, rates()).seconds(1 << 20)))


def _measured(machine: Machine, gpus: Sequence[Gpu]) -> AllReduce | None:
    """Return the group's all-reduce, measured or estimated from its slowest pair of GPUs, or None.

    The estimate is slow, since it lets all ranks share one host bridge.
    """
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
    """Return the all-reduce of ``ranks`` GPUs from the seconds that ``measured`` ranks needed.

    ``times`` has the seconds of at least two sizes in bytes.
    """
    small, large = min(times), max(times)
    slope = max((times[large] - times[small]) / (large - small), 1e-15)
    latency = max(times[small] - slope * small, 0.0) / ((1 + log2(measured)) / 2)
    return AllReduce(ranks=ranks, latency=latency, bandwidth=2 * (measured - 1) / measured / slope)


class Speed(Struct):
    """The forecast of one group.

    ``seconds_to_first_token`` is for a request that comes while all others run. If all answers have
    equal lengths, prompts come together, and the figure is their mean. Otherwise the request comes
    at a random time, and waits for the prompt in progress. ``alone`` is the time to the first token
    on an idle engine. ``running`` is the average number of requests in the batch. ``prefill`` is
    the seconds of one request's prompt, ``step`` the seconds of one token of all running requests,
    and ``reduce`` the part of ``step`` that links take. ``encodings`` is how often the images of a
    single request are encoded. ``source`` says what was timed, where and when; empty for constants.
    A larger cache never gives fewer requests a second.
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
    source: str = ""


def request_tokens(vision_load: VisionLoad) -> int:
    """Return the tokens of the workload's request: its images, and the supposed text and answer."""
    load = vision_load
    return load.tokens_per_request + load.text_tokens + load.output_tokens


def counted_tokens(vision_load: VisionLoad, session_len: int) -> int:
    """Return the tokens of the workload's request, at most ``session_len``.

    Verdicts count how many requests of this size fit. If images wait for each other, a request that
    states no length may have a longer answer. If by more than a fifth fewer of these requests fit,
    they are counted.
    """
    load, tokens = vision_load, request_tokens(vision_load)
    unstated = tokens + (UNSTATED_ANSWERS - 1) * load.output_tokens
    if load.units_per_forward is not None and tokens < (1 - _MUCH_FEWER) * unstated:
        tokens = unstated
    return min(tokens, session_len)


class ClosedLoad(Struct):
    """A closed load: always the same number of equal requests.

    ``prompt`` and ``output`` are the tokens of one request, with images in the prompt. ``at_once``
    may be a fraction (8 requests over 7 replicas: 8/7); below one, the engine is idle in between.
    ``spread`` is the squared coefficient of variation of an answer's length: 0 for equal lengths, 1
    for an exponential distribution.
    """

    prompt: float
    output: float
    at_once: float
    images: VisionLoad = NO_IMAGES
    spread: float = 0.0


class GroupRates(Struct):
    """The rates of a group's cards and links, and a model's work on one rank."""

    work: StepWork
    card: GpuRates
    reduce: AllReduce
    steps: StepRatios = StepRatios()

    def seconds(
        self, figures: Rates, tokens: float, *, pairs: float = 0.0, cached: float = 0.0
    ) -> float:
        """Return the seconds of one forward over ``tokens`` tokens.

        Reading the weights and computing take place at the same time. ``pairs`` is the number of
        pairs of a prompt's token and a token that it attends to; ``cached`` is the number of tokens
        whose keys and values are read.
        """
        forward = self.forward_seconds(figures, tokens) * ratio_at(self.steps.forward, tokens)
        return forward + pairs * self.pair_seconds + cached * self.context_seconds

    def forward_seconds(self, figures: Rates, tokens: float) -> float:
        """Return the constants' seconds of a forward over ``tokens`` tokens, without attention."""
        work, card = self.work, self.card
        products = max(
            work.read_bytes(tokens) / card.bandwidth, tokens * work.token_flops / card.flops
        )
        return products + self.launch_seconds(figures, tokens)

    def launch_seconds(self, figures: Rates, tokens: float) -> float:
        """Return the part of a forward that faster cards do not shorten: launches and links."""
        launches = self.work.layers * figures.layer_seconds + figures.step_seconds
        return launches + self.reduces(tokens)

    @property
    def pair_seconds(self) -> float:
        """The seconds of the attention of one token of a prompt to another token."""
        return self.steps.pair * self.work.pair_flops / self.card.flops

    @property
    def context_seconds(self) -> float:
        """The seconds in which the keys and values of one cached token are read."""
        return self.steps.context * self.work.kv_read_bytes / self.card.cache_bandwidth

    def measured(self, steps: MeasuredSteps, source: str) -> GroupRates:
        """Return the rates with which a forecast gives the seconds that an engine was timed at.

        ``steps`` has these seconds, and ``source`` says what was timed, where and when.
        """
        ratios = ratios_of(
            steps,
            forward=lambda tokens: self.forward_seconds(rates(), tokens),
            tower=self.tower_seconds,
            pair=self.pair_seconds,
            context=self.context_seconds,
        )
        return replace(self, steps=replace(ratios, source=source))

    @property
    def plain(self) -> GroupRates:
        """The rates as if the tower's attention took no time, for the choice of a batch."""
        return replace(self, work=replace(self.work, tower=self.work.tower.plain))

    def tower_seconds(self, units: float) -> float:
        """Return the seconds in which an image of ``units`` vision units is encoded once."""
        tower, card = self.work.tower, self.card
        products = tower.unit_flops * units / card.vision_flops
        seconds = products + tower.attention_flops(units) / card.vision_attention_flops
        return seconds * ratio_at(self.steps.image, units)

    def reduces(self, tokens: float) -> float:
        """Return the seconds on links in a forward over ``tokens`` (two all-reduces a layer)."""
        times, reduce = 2 * self.work.layers, self.reduce
        token_reduces = times * reduce.seconds_per_byte * self.work.hidden_bytes
        return times * reduce.launch + tokens * token_reduces


def group_rates(
    model: Model, settings: Settings, machine: Machine, gpus: Sequence[Gpu], engine: Engine
) -> GroupRates:
    """Return a group's rates, with the seconds that `turbofit calibrate` timed of its engine.

    If `turbofit calibrate` timed only other models, the cards' rates that follow from their
    forwards replace the presets' rates.
    """
    group = GroupRates(
        work=work_of(model, settings, engine),
        card=card_of(gpus, rates(), machine.measured),
        reduce=all_reduce_of(machine, gpus, rates()),
    )
    if not machine.calibrations:
        return group
    calibration = timed_for(model, settings, machine, gpus, engine)
    if calibration is not None and calibration.steps is not None:
        source = f"the engine's steps as measured {calibration.where} on {calibration.when[:10]}"
        return group.measured(calibration.steps, source)
    found, source = rates_shown(model, settings, machine, gpus, engine)
    card = replace(group.card, **found)
    attention = card.vision_attention_flops * card.vision_flops / group.card.vision_flops
    card = replace(card, vision_attention_flops=attention)
    return replace(group, card=card, steps=StepRatios(source=source))


def engine_rates(plan: Plan, engine: EnginePlan) -> GroupRates:
    """Return the rates of one of a plan's engines."""
    settings, machine = engine.settings, plan.machine
    gpus = [machine.gpu(index) for index in engine.gpus][: settings.tp]
    return group_rates(plan.model, settings, machine, gpus, engine_of(plan))


def group_speed(
    group: GroupRates,
    settings: Settings,
    requested_load: VisionLoad,
    kv_tokens: int,
    at_once: float,
) -> Speed:
    """Forecast one group's speed for the workload's request, with the image limit that was wished.

    A request longer than a session gets a shorter prompt. Images that wait for each other cost
    nothing here, and 1 % under the clock (docs/speed.md): the engine works on other requests.
    """
    output = min(requested_load.output_tokens, max(1, settings.session_len - 1))
    load = ClosedLoad(
        prompt=min(request_tokens(requested_load), settings.session_len) - output,
        output=output,
        at_once=float(at_once),
        images=requested_load,
    )
    return speed_of(group, rates(), load, settings, kv_tokens)


def speed_of(
    group: GroupRates, figures: Rates, load: ClosedLoad, settings: Settings, kv_tokens: float
) -> Speed:
    """Forecast one engine's speed under a closed load; its cache holds ``kv_tokens``."""
    work, card, at_once = group.work, group.card, load.at_once
    whole, context = load.prompt + load.output, load.prompt + load.output * (1 + load.spread) / 2
    admitted = min(at_once, settings.max_batch_size)
    room, fitting = max(0.0, whole / context - 1), max(1.0, kv_tokens // whole)
    mean, repeated = crowd_of(admitted, fitting, room, load.output, figures.recomputed_share)
    running = max(1.0, mean)

    # The prompt counts as one forward, so the forecast is slightly high: the launches of more
    # forwards, 1 % at most, must not outweigh the cache that a smaller prefill leaves.
    text = group.seconds(figures, load.prompt, pairs=load.prompt**2 / 2)
    step = group.seconds(figures, running, cached=running * context)
    encoding = group.tower_seconds(load.images.units_per_image)
    encodings, cut = _encodings(work, load, settings)
    alone = text + encodings * encoding
    # Answers that end in the same step admit several prompts, which are read back to back.
    together = (running - 1) / load.output
    behind = 1 - (1 - exp(-together)) / together if together else 0.0
    images = encoding * (encodings + cut * behind)
    prefill = text + images
    # An evicted request starts again, with its images.
    again = repeated * load.output
    again = again * work.token_flops / card.flops + images * again / whole

    # In one cycle, every running request is read and answered once.
    cycle = running * (prefill + again) + load.output * step
    # LMDeploy's event loop runs beside the GPU, so the slower of the two sets the rate.
    rate = min(min(1.0, admitted) * running / cycle, 1 / figures.request_seconds)
    if load.spread:
        others = (running - 1) * (prefill + again) / cycle
        first = prefill * (1 + others * (1 + together) / 2)
    else:
        first = _prompt_wait(prefill, running, load, work.prompt_tokens(settings))
    first += step
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
        source=group.steps.source,
    )


def _prompt_wait(prefill: float, running: float, load: ClosedLoad, forward: int) -> float:
    """Return the mean seconds until a prompt is read, if all answers have equal lengths.

    A forward reads ``forward`` tokens of prompts. Answers that began in one forward end in one
    step, so their next prompts meet in one forward again. The answers of the next forward end in
    the next step. TurboMind 0.18 composes a forward while another forward runs, so a prompt waits
    for two full forwards; the first prompts wait for none, the second prompts for one. If all
    prompts take more forwards than an answer has steps, they also wait for the other forwards.

    `bench/clock` compares this formula with LMDeploy's own scheduler. `throughput.with_host` adds
    the wait of images for the host. How the PyTorch engine queues prompts is not known.
    """
    met = max(1.0, min(running, forward / load.prompt))
    forwards, full = running / met, prefill * min(met, forward / load.prompt)
    return met * prefill + full * max(1 - 1 / forwards, 2 - 3 / forwards, forwards - load.output)


def _encodings(work: StepWork, load: ClosedLoad, settings: Settings) -> tuple[int, float]:
    """Return how often one request's images are encoded, and how often more if requests wait.

    Waiting prompts are read back to back: a forward may end within the images of the next prompt,
    which are then encoded again in the next forward. The second number is 0 if no forward has parts
    of two prompts: if two prompts are longer than a context, or if the gateway queues images. The
    second number is also 0 for a tower whose attention takes no time.
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
    """Return the average number of running requests, and the share of an answer that is recomputed.

    The formula was fitted to `tests/planning/simulated_cache.py`.

    Args:
        admitted: requests that the batch admits.
        fitting: requests whose prompt and whole answer fit into the cache, at least one.
        room: the share by which more requests fit at their mean length than at their full length.
        output: tokens of an answer; short answers end soon, so that fewer requests are evicted.
        recomputed_share: the largest share of an answer that is recomputed.
    """
    if admitted <= fitting:
        return admitted, 0.0
    evicting = 1 - exp((1 - admitted / fitting) / max(room, _LEAST_ROOM))
    running = min(admitted, fitting * (1 + room * evicting))
    return running, evicting * recomputed_share / (1 + fitting / output)
