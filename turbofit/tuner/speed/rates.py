"""The constants of the speed forecast, and what they make of a card."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import msgspec

from turbofit.core.machine import Gpu, Measured
from turbofit.core.presets import load_yaml, preset_path
from turbofit.core.struct import Struct, known

__all__ = ["GpuRates", "Rates", "card_of", "rates"]

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
