"""A first forecast of speed: enough to rank replicas against shards, and said to be an estimate.

Decoding reads the weights and the keys and values once a step; prefill and vision are FLOPs; every
layer reduces twice over the group's slowest link. An image that TurboMind's chunked prefill cuts is
encoded again in every chunk. Figures and their sources are in `presets/engines/throughput.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from turbofit.core.machine import Gpu, Machine
from turbofit.core.model import Model, PatchRule
from turbofit.core.plan import Settings, Throughput
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct, known
from turbofit.memory.engine import Engine
from turbofit.memory.exposure import Exposure
from turbofit.memory.turbomind.weights import vision_side
from turbofit.tuner.links import LinkClass, group_class, nvlink_bandwidth

__all__ = ["Speed", "group_speed", "request_tokens", "total"]

#: What a card gives that neither NVML nor a preset knows: a slow one, so the forecast is low.
_UNKNOWN_BANDWIDTH = 200 * 10**9
_UNKNOWN_FLOPS = 20 * 10**12


class Speed(Struct):
    """One group's forecast for the workload's request, with all its requests at once.

    Both figures only improve with a larger cache.
    """

    requests_per_second: float
    seconds_per_request: float
    concurrent: int


@cache
def _figures() -> dict[str, float]:
    entries = load_yaml(preset_path("engines", "throughput"))
    return {name: entry["value"] for name, entry in entries.items()}


def request_tokens(exposure: Exposure) -> int:
    """Tokens of the workload's request: its images, and the assumed text and answer."""
    figures = _figures()
    return int(exposure.tokens_per_request + figures["text_tokens"] + figures["output_tokens"])


def group_speed(
    model: Model,
    settings: Settings,
    machine: Machine,
    gpus: Sequence[Gpu],
    asked: Exposure,
    kv_tokens: int,
    engine: Engine,
) -> Speed:
    """The forecast of one group.

    Args:
        model: the checkpoint.
        settings: the engine's options.
        machine: for the links.
        gpus: the group.
        asked: the workload's own request, before any limit was lowered for it.
        kv_tokens: what the cache holds; bounds the requests that run together.
        engine: the engine generation's figures.
    """
    figures, tp = _figures(), settings.tp
    traffic = engine.traffic(model, tp)
    bandwidth = min(known(g.memory_bandwidth, _UNKNOWN_BANDWIDTH) for g in gpus)
    bandwidth_seconds = 1 / (bandwidth * figures["memory_efficiency"])
    flops = min(known(g.dense_flops, _UNKNOWN_FLOPS) for g in gpus) * figures["compute_efficiency"]

    tokens = request_tokens(asked)
    prompt = tokens - figures["output_tokens"]
    concurrent = min(settings.max_batch_size, max(1, kv_tokens // tokens))
    kv = engine.block_bytes(model, settings) / settings.cache_block_seq_len
    step = (traffic.decode + concurrent * tokens * kv) * bandwidth_seconds
    step += _reduce_seconds(model, settings, machine, gpus, concurrent)

    dense = _dense_parameters(model) * 2 / tp
    passes = -(-prompt // settings.max_prefill_token_num)
    encodes = asked.images_per_request + (passes - 1 if engine.encodes_again else 0)
    prefill = dense * prompt / flops
    if asked.units_per_image:
        each = traffic.vision / 2 * 2 * _vision_tokens(model, asked.units_per_image)
        prefill += each * encodes / flops
    prefill += _reduce_seconds(model, settings, machine, gpus, prompt)
    # Requests that the cache cannot hold yet wait their turn.
    waiting = settings.max_batch_size / concurrent
    seconds = (prefill + figures["output_tokens"] * step) * waiting
    together = concurrent * prefill + figures["output_tokens"] * step
    return Speed(
        requests_per_second=concurrent / together,
        seconds_per_request=seconds,
        concurrent=concurrent,
    )


def total(speeds: Sequence[Speed]) -> Throughput:
    """The forecast over all replicas."""
    figures = _figures()
    rate = sum(speed.requests_per_second for speed in speeds)
    return Throughput(
        basis=(
            f"estimate: {figures['text_tokens']} text tokens beside the workload's images, "
            f"{figures['output_tokens']} answered; rates assumed, not measured"
        ),
        requests_per_second=round(rate, 4),
        output_tokens_per_second=round(rate * figures["output_tokens"], 1),
        concurrent_requests=sum(speed.concurrent for speed in speeds),
    )


def _dense_parameters(model: Model) -> float:
    """Parameters that one token passes through, without the embedding."""
    text = model.text
    gate = text.heads if text.output_gate else 0
    attention = text.hidden * text.head_dim * (2 * text.heads + gate + 2 * text.kv_heads)
    attention *= text.attention_layers
    if text.delta is not None:
        delta = text.delta
        attention += delta.layers * text.hidden * (delta.channels + 2 * delta.values)
    mlp = 3 * text.hidden * text.intermediate
    if text.moe is not None:
        moe = text.moe
        routed = moe.experts_per_token * moe.intermediate + moe.shared_intermediate
        share = moe.layers / text.layers
        mlp = int(mlp * (1 - share) + 3 * text.hidden * routed * share)
    return float(attention + text.layers * mlp + text.vocab * text.hidden)


def _vision_tokens(model: Model, units: int) -> int:
    """Tokens that the tower itself runs on."""
    if isinstance(model.image_rule, PatchRule) or model.vision is None:
        return units
    return units * (vision_side(model.vision) ** 2 + 1)


def _reduce_seconds(
    model: Model, settings: Settings, machine: Machine, gpus: Sequence[Gpu], tokens: float
) -> float:
    """Two all-reduces of the hidden states in every layer."""
    tp, figures = settings.tp, _figures()
    if tp == 1:
        return 0.0
    kind = group_class(machine, gpus)
    if kind == LinkClass.NVLINK:
        bandwidth = nvlink_bandwidth(machine, gpus) * figures["nvlink_efficiency"]
        latency = figures["nvlink_latency"]
    elif kind == LinkClass.PCIE_PEER:
        bandwidth = figures["pcie_bandwidth"] * min(_pcie_scale(gpu) for gpu in gpus)
        latency = figures["pcie_latency"]
    else:
        bandwidth, latency = figures["host_bandwidth"], figures["host_latency"]
    size = tokens * model.text.hidden * 2 * 2 * (tp - 1) / tp
    return 2 * model.text.layers * (latency + size / max(bandwidth, figures["host_bandwidth"]))


def _pcie_scale(gpu: Gpu) -> float:
    """The card's PCIe link relative to 3.0 x16; the older where unknown."""
    generation, width = known(gpu.pcie.generation, 3), known(gpu.pcie.width, 16)
    return float(2.0 ** (generation - 3) * width / 16)
