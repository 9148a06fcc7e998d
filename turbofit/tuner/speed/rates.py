"""What a card sustains, and what requests ask of one rank: bytes to read, products to compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import msgspec

from turbofit.core.machine import Gpu, Measured
from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct, known
from turbofit.memory.account import Engine, VisionLoad

__all__ = ["GpuRates", "Rates", "StepWork", "card_of", "rates", "vision_seconds", "work_of"]

#: What a card gives that neither NVML nor a preset knows: a slow one, so the forecast is low.
_UNKNOWN_BANDWIDTH = 200 * 10**9
_UNKNOWN_FLOPS = 20 * 10**12


class Rates(Struct):
    """The constants, as `presets/engines/throughput.yaml` explains them with their sources.

    Efficiencies, factors and errors are shares, ``*_seconds`` and ``*_latency`` seconds,
    ``*_bandwidth`` bytes/s, ``*_tokens`` tokens.
    """

    memory_efficiency: float
    compute_efficiency: float
    vision_efficiency: float
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
    queued_share: float
    median_error: float
    p90_error: float
    error_figures: int
    error_cards: int


#: Shares of a card's own peak that a large copy and a large product reach: a measured card's
#: figures are those, where the efficiencies are of the peak.
_COPY_SHARE = 0.9
_PRODUCT_SHARE = 0.75


class GpuRates(Struct):
    """What the slowest card of a group sustains: bytes/s of memory, FLOP/s of 16-bit products.

    ``vision_flops`` are those of the vision tower.
    """

    bandwidth: float
    flops: float
    vision_flops: float


@cache
def rates(priors: tuple[str, ...] = ()) -> Rates:
    """The constants of the presets; of ``priors`` those before a bench's fit, where there are."""
    entries = load_yaml(preset_path("engines", "throughput"))
    found = {
        name: entry.get("prior" if name in priors else "value", entry["value"])
        for name, entry in entries.items()
    }
    return msgspec.convert(found, Rates)


def card_of(gpus: Sequence[Gpu], figures: Rates, measured: Measured | None = None) -> GpuRates:
    """What the slowest of these cards sustains; of a measured card the measured figures count."""
    seen = {one.index: one for one in measured.cards} if measured else {}
    bandwidth = min(
        seen[gpu.index].bandwidth / _COPY_SHARE
        if gpu.index in seen
        else known(gpu.memory_bandwidth, _UNKNOWN_BANDWIDTH)
        for gpu in gpus
    )
    flops = min(
        seen[gpu.index].flops / _PRODUCT_SHARE
        if gpu.index in seen
        else known(gpu.dense_flops, _UNKNOWN_FLOPS)
        for gpu in gpus
    )
    return GpuRates(
        bandwidth=bandwidth * figures.memory_efficiency,
        flops=flops * figures.compute_efficiency,
        vision_flops=flops * figures.vision_efficiency,
    )


class StepWork(Struct):
    """One model in one shape; all of one rank unless the name says otherwise.

    ``weights`` are bytes that a decode step reads whatever its batch, ``experts`` those of routed
    experts, of which a token takes the share ``routed``. ``token_flops`` and ``pair_flops`` are of
    one token through the layers, and of one token's attention to one other. ``vision_flops`` are of
    one unit. ``hidden_bytes`` is one token's hidden state.
    """

    layers: int
    hidden_bytes: int
    weights: float
    experts: float
    routed: float
    token_flops: float
    pair_flops: float
    kv_bytes: float
    vision_flops: float = 0.0
    encodes_again: bool = False

    def read_bytes(self, batch: float) -> float:
        """Bytes of weights that one step reads: more experts are met, the more tokens there are."""
        return self.weights + self.experts * float(1 - (1 - self.routed) ** batch)


def work_of(model: Model, settings: Settings, engine: Engine) -> StepWork:
    """The work of a model under settings.

    Args:
        model: the checkpoint.
        settings: ``tp``, and what decides the size of a cached token.
        engine: whose sharding counts.
    """
    text, tp = model.text, settings.tp
    traffic = engine.traffic(model, tp)
    routed = share = 0.0
    if text.moe is not None:
        moe = text.moe
        routed = moe.experts_per_token / moe.experts
        of_experts = 3.0 * text.hidden * moe.intermediate * moe.experts * moe.layers
        share = of_experts / (of_experts + _dense_parameters(model, with_experts=False))
    vision = traffic.vision / 2 * 2 * model.unit_tower_tokens
    return StepWork(
        layers=text.layers,
        hidden_bytes=text.hidden * 2,
        weights=traffic.decode * (1 - share),
        experts=traffic.decode * share,
        routed=routed,
        token_flops=2 * _dense_parameters(model) / tp,
        pair_flops=4.0 * text.heads * text.head_dim * text.attention_layers / tp,
        kv_bytes=engine.block_bytes(model, settings) / settings.cache_block_seq_len,
        vision_flops=vision,
        encodes_again=engine.encodes_again,
    )


def vision_seconds(work: StepWork, requested_load: VisionLoad, passes: int, flops: float) -> float:
    """Seconds of a request's images; those that chunked prefill cuts may be encoded again."""
    if not requested_load.units_per_image:
        return 0.0
    encodes = requested_load.images_per_request + (passes - 1 if work.encodes_again else 0)
    return work.vision_flops * requested_load.units_per_image * encodes / flops


def _dense_parameters(model: Model, *, with_experts: bool = True) -> float:
    """Parameters that one token passes through, without the embedding."""
    text = model.text
    gate = text.heads if text.output_gate else 0
    attention = text.hidden * text.head_dim * (2 * text.heads + gate + 2 * text.kv_heads)
    attention *= text.attention_layers
    if text.delta is not None:
        delta = text.delta
        attention += delta.layers * text.hidden * (delta.channels + 2 * delta.values)
    mlp = 3.0 * text.hidden * text.intermediate * text.layers
    if text.moe is not None:
        moe = text.moe
        routed = moe.experts_per_token * moe.intermediate if with_experts else 0
        mlp *= 1 - moe.layers / text.layers
        mlp += 3.0 * text.hidden * (routed + moe.shared_intermediate) * moe.layers
    return float(attention + mlp + text.vocab * text.hidden)
