"""What loading takes besides the weights: temporaries, torch's staging, host memory."""

from __future__ import annotations

from turbofit.core.model import DTYPE_BYTES, Model
from turbofit.core.plan import HostMemory, Settings
from turbofit.core.units import HALF, round_up
from turbofit.memory.turbomind.buffers import pinned_buffers
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import (
    expert_width,
    ffn_width,
    kv_heads_held,
    lm_head_rows,
    packed_elements,
)

__all__ = ["host_memory", "loading_extra", "staging_bytes", "temporary_bytes"]


def temporary_bytes(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """Bytes per rank of weight preparation that are still held when free memory is read.

    The last cast or repack is freed without a synchronisation before TurboMind asks for free
    memory: lm_head as stored where its dtype is cast (in 0.16 and 0.17 on Hopper always a copy);
    the widest repacked linear, with what scales took more while loading. Experts are repacked at 16
    bits, too.
    """
    text, quantization = model.text, model.quantization
    cast = 0
    copied = capability[0] * 10 + capability[1] in constants.copied_16bit
    if settings.dtype != model.dtype or copied:
        width = DTYPE_BYTES[model.dtype] if settings.dtype != model.dtype else HALF
        cast = lm_head_rows(text, settings.tp) * text.hidden * width // settings.tp
    repack = 0
    if text.moe is not None:
        width = expert_width(
            text.moe.intermediate, settings.tp, quantization, constants, capability
        )
        each: float = constants.expert_format(capability).temporary
        if quantization is not None and quantization.of_experts:
            each = constants.packed_format(quantization, capability).temporary
        repack = int(text.hidden * 2 * width // settings.tp * each)
    if quantization is not None and not quantization.of_experts:
        packed = constants.packed_format(quantization, capability)
        dense = _widest_dense(model, settings.tp, constants)
        repack = max(repack, int(dense * packed.temporary))
        # One page more than the tensor: its scales share a page with what is freed beside them.
        repack += constants.pool_granularity
        repack += loading_extra(model, settings, constants, capability)
    return max(cast, repack)


def _widest_dense(model: Model, tp: int, constants: EngineConstants) -> int:
    """Elements of one rank's widest linear outside experts: gate and up, or Q, K and V."""
    text = model.text
    inner = text.intermediate
    if text.moe is not None:
        dense = text.intermediate if text.moe.layers < text.layers else 0
        inner = max(dense, text.moe.shared_intermediate)
    width = 2 * ffn_width(inner, tp, model.quantization, constants)
    qkv = (text.heads + 2 * kv_heads_held(text.kv_heads, tp)) * text.head_dim
    return text.hidden * max(width, qkv) // tp


def loading_extra(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """Bytes per rank that packed linears take more while loading than once they are prepared."""
    if model.quantization is None:
        return 0
    packed = constants.packed_format(model.quantization, capability)
    elements = packed_elements(model, settings.tp, constants)
    groups = packed.groups(elements, model.quantization.group_size)
    return int(groups * (packed.load_group - packed.group))


def staging_bytes(model: Model, settings: Settings, constants: EngineConstants) -> int:
    """Bytes that torch's allocator holds on the group's first GPU until the export ends.

    The whole embedding waits there for the text model to be built, while lm_head passes raw and as
    its contiguous shard, or whole again where it is padded or cast; torch gives none of it back
    before the end. A wide layer can take more than lm_head: its raw linears, gate and up joined,
    and their shards. Source: LMDeploy models/*.py, builders/_base.py, and its loader's storages.
    """
    text, tp, page = model.text, settings.tp, constants.pool_granularity
    stored = DTYPE_BYTES[model.dtype]
    embedding = round_up(text.vocab * text.hidden * stored, page)
    copied = lm_head_rows(text, tp) != text.vocab or settings.dtype != model.dtype
    copy = lm_head_rows(text, tp) * text.hidden * stored // (1 if copied else tp)
    lm_head = embedding + round_up(copy, page)
    widest = text.intermediate
    if text.moe is not None and text.moe.layers == text.layers:
        widest = max(text.moe.intermediate, text.moe.shared_intermediate)
    gate, copies = text.hidden * widest, constants.load_layer
    shards = copies["shards"] / tp if tp > 1 else 0.0
    layer = gate * stored * (copies["whole"] + shards)
    if model.quantization is not None:
        layer = gate * copies["packed"]
    return embedding + max(lm_head, round_up(int(layer), page) + page)


def host_memory(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    *,
    units_per_forward: int,
) -> HostMemory:
    """Host memory of one replica: pinned by every rank, pageable by its server process.

    Pixels are pinned by each rank for the images of one forward, once for each phase; pageable
    memory holds them in 32 bits while they are preprocessed, one request at a time.
    """
    pixels = model.pixel_bytes(units_per_forward)
    phases = 2 if settings.async_ else 1
    pinned = (pinned_buffers(model, settings) + pixels * phases) * settings.tp
    pageable = constants.host_process + pixels * 3
    return HostMemory(pinned=pinned, pageable=pageable, available=None)
