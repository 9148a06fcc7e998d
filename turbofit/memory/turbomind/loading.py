"""What loading takes besides the weights: temporaries, torch's staging, host memory."""

from __future__ import annotations

from turbofit.core.model import DTYPE_BYTES, Model, PatchRule, TileRule
from turbofit.core.plan import HostMemory, Settings
from turbofit.memory.turbomind.buffers import pinned_buffers
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import ffn_width, lm_head_rows

__all__ = ["host_memory", "pixel_bytes", "staging_bytes", "temporary_bytes"]

_HALF = 2


def temporary_bytes(model: Model, settings: Settings, constants: EngineConstants) -> int:
    """Bytes per rank of weight preparation that are still held when free memory is read.

    The last cast or repack is freed without a synchronisation before TurboMind asks for free
    memory: lm_head's copy where the checkpoint's dtype is cast, the widest grouped linear at
    16 bits where it is repacked.
    """
    text = model.text
    cast = 0
    if settings.dtype != model.dtype:
        cast = lm_head_rows(text, settings.tp) * text.hidden * _HALF // settings.tp
    repack = 0
    if model.quantization is not None:
        width = ffn_width(text.intermediate, settings.tp, model.quantization, constants)
        # One page more than the tensor: its scales share a page with what is freed beside them.
        repack = text.hidden * 2 * width // settings.tp * _HALF + constants.pool_granularity
    return max(cast, repack)


def staging_bytes(model: Model, settings: Settings, constants: EngineConstants) -> int:
    """Bytes that torch's allocator holds on the group's first GPU until the export ends.

    The whole embedding waits there for the text model to be built, while lm_head passes raw and as
    its contiguous shard, or whole again where it is padded or cast; torch gives none of it back
    before the end. A wide layer can take more than lm_head: its raw linears and the concatenated
    gate and up. Over by what the two share. Source: LMDeploy models/*.py, builders/_base.py.
    """
    text, tp = model.text, settings.tp
    stored = DTYPE_BYTES[model.dtype]
    embedding = text.vocab * text.hidden * stored
    copied = lm_head_rows(text, tp) != text.vocab or settings.dtype != model.dtype
    lm_head = embedding + lm_head_rows(text, tp) * text.hidden * stored // (1 if copied else tp)
    layer = 3 * text.hidden * text.intermediate
    layer_bytes = layer * stored
    if model.quantization is not None:
        layer_bytes = layer * model.quantization.bits // 8
    return embedding + max(lm_head, int(layer_bytes * constants.load_linear_copies))


def pixel_bytes(model: Model, units: int) -> int:
    """Bytes of the preprocessed pixels of so many units at 16 bits."""
    rule, vision = model.image_rule, model.vision
    if vision is None:
        return 0
    if isinstance(rule, TileRule):
        return units * vision.channels * rule.tile_size**2 * _HALF
    if isinstance(rule, PatchRule):
        patch = vision.channels * vision.temporal_patch * rule.patch_size**2
        return units * patch * _HALF
    return 0


def host_memory(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    *,
    units_per_forward: int,
    replicas: int,
    available: int | None,
) -> HostMemory:
    """Host memory of all replicas: pinned by every rank, pageable by every server process.

    Pixels are pinned by each rank for the images of one forward, once for each phase; pageable
    memory holds them in 32 bits while they are preprocessed, one request at a time.
    """
    pixels = pixel_bytes(model, units_per_forward)
    phases = 2 if settings.async_ else 1
    pinned = (pinned_buffers(model, settings) + pixels * phases) * settings.tp
    pageable = constants.host_process + pixels * 3
    return HostMemory(pinned=pinned * replicas, pageable=pageable * replicas, available=available)
