"""Bytes of the weights that one rank holds, by tensor class, and what loading takes besides.

Follows LMDeploy's builders (`lmdeploy/turbomind/builders`, `models`): what is split, replicated,
padded or repeated under tensor parallelism. Exact but for the pool's rounding, the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import lcm, log2, sqrt
from typing import NamedTuple

from msgspec.structs import replace

from turbofit.core.model import (
    DTYPE_BYTES,
    DeltaDims,
    Model,
    Quantization,
    TextDims,
    VisionDims,
)
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import HALF, round_up
from turbofit.core.version import REFERENCE
from turbofit.memory.account import HOPPER, PAGE
from turbofit.memory.versions import figures
from turbofit.model.parameters import exempt_bytes, unpacked_bytes


class PackedFormat(Struct):
    """Scales and zeros of a group in bytes, held and while loading; temporaries an element.

    ``of``: elements of the kernels' groups, which repeat the scales of larger ones.
    ``align``: channels of whose multiple each rank's experts have, where it is not the group's.
    ``input``: bytes an element of a linear's input, where the kernels take it quantised.
    """

    group: float
    load_group: float
    temporary: float
    of: int | None = None
    fused_silu: bool = False
    align: int | None = None
    input: float = 0.0

    def groups(self, elements: int, stored: int) -> int:
        """Groups of so many elements whose stored groups have so many."""
        return elements // (stored if self.of is None else min(stored, self.of))


class ExpertFormat(Struct):
    """How one kind of card holds the linears of experts, packed or at 16 bits.

    ``align``: channels of whose multiple each rank's experts have at 16 bits.
    """

    temporary: int
    align: int = 32
    fused_silu: bool = False


class DeltaKernel(Struct):
    """How one kind of card runs gated delta nets.

    ``chunk`` tokens of a prompt are worked on together, with a workspace; 0: without one.
    ``segment`` scales how many chunks a segment has. Sequences are cut into segments where all have
    at most ``cut_heads`` heads, or ``cut_long_heads`` beside one of ``cut_long_chunks`` chunks.
    """

    dtypes: tuple[str, ...]
    chunk: int = 0
    segment: float = 0.0
    cut_heads: int = 0
    cut_long_heads: int = 0
    cut_long_chunks: int = 0

    def most_heads(self, longest: int) -> int:
        """Heads of all sequences up to which these are cut: more beside a long one, in chunks."""
        if longest < self.cut_long_chunks:
            return self.cut_heads
        return max(self.cut_heads, self.cut_long_heads)

    def segment_chunks(self, heads: int, chunks: int, sm_count: int) -> int:
        """Chunks of a segment: a power of two."""
        scaled = sqrt(heads * chunks / sm_count) * self.segment
        return max(4, 1 << max(0, round(log2(max(1.0, scaled)))))


class EngineConstants(Struct):
    """What one TurboMind generation fixes, in bytes unless the name says otherwise.

    The meaning, source and sign of each figure stand beside it in the YAML file.
    """

    version: str
    pool_granularity: int
    page_size: int
    slab_fill: float
    slab_limit: int
    gemm_workspace: tuple[int, ...]
    attention_workspace_tokens: int
    max_log_probs: int
    kv_flatten_pad_tokens: int
    warmup_lengths: tuple[int, ...]
    ffn_align_16bit: int
    ffn_align_grouped: int
    vision_head_dims: dict[int, int]
    ipc_packet: int
    ipc_scratch: int
    nccl_buffers: dict[str, int]
    cublas_handles: int
    cublas_handle: dict[str, int]
    torch_kernels: int
    kernel_modules: int
    pool_growth: dict[str, float]
    packed: dict[str, dict[str, PackedFormat]]
    experts: dict[str, ExpertFormat]
    load_layer: dict[str, float]
    delta_rule: dict[str, DeltaKernel]
    host_process: int
    pinned_call: str
    #: Of older generations only: the GEMM workspace that is made with the context, and the compute
    #: capabilities on which dense linears of 16 bits are prepared through a copy.
    gemm_in_context: tuple[int, ...] = ()
    copied_16bit: tuple[int, ...] = ()

    def packed_format(
        self, quantization: Quantization, capability: tuple[int, int]
    ) -> PackedFormat:
        """How a card of this compute capability holds linears that are packed so."""
        formats = self.packed.get(quantization.method, self.packed["int4"])
        return formats.get(f"{capability[0]}{capability[1]}", formats["default"])

    def expert_format(self, capability: tuple[int, int]) -> ExpertFormat:
        """How a card of this compute capability holds experts."""
        return self.experts.get(f"{capability[0]}{capability[1]}", self.experts["default"])

    def delta_kernel(self, capability: tuple[int, int]) -> DeltaKernel | None:
        """How a card of this compute capability runs gated delta nets; None where none does."""
        if capability < HOPPER:
            return self.delta_rule["before_90"]
        return self.delta_rule.get(f"{capability[0]}{capability[1]}")


@cache
def load_constants(version: str = REFERENCE) -> EngineConstants:
    return figures("turbomind", version, EngineConstants)


#: Elements of a 16-byte vector of 16-bit values: what lm_head rows are padded to for each rank.
_VECTOR = 8
#: Bytes of which every allocation from a pool of CUDA's is a multiple.
_POOL_BLOCK = 512


def weight_classes(
    model: Model,
    tp: int,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> dict[str, int]:
    """Bytes per rank of each tensor class of a model; packed ones differ by the card's kind."""
    text, packing = model.text, None
    if model.quantization is not None:
        packed = constants.packed_format(model.quantization, capability)
        packing = _Packing(model.quantization, packed)
    dense = None if packing and packing.quantization.of_experts else packing
    # At 16 bits whatever the checkpoint stores.
    classes = {
        "embedding": text.vocab * text.hidden * HALF // tp,
        "lm_head": lm_head_rows(text, tp) * text.hidden * HALF // tp,
        "attention": sum(_attention(text, tp, dense)) * text.attention_layers,
        "mlp": _mlp(text, tp, packing, constants, capability),
        "norms": (2 * text.layers + 1) * text.hidden * HALF
        + (2 * text.attention_layers * text.head_dim * HALF if text.qk_norm else 0)
        + (text.layers * (text.mla.q_rank + text.mla.kv_rank) * HALF if text.mla else 0),
    }
    if text.delta is not None:
        classes["delta"] = sum(_delta(text, text.delta, tp, packing)) * text.delta.layers
    unpacked = _unpacked(model)
    if unpacked:
        classes["unpacked"] = -(-unpacked // tp)
    if model.vision is not None:
        classes["vision"] = sum(_vision(model.vision, tp, constants))
        classes["projector"] = sum(_projector(model.vision, text.hidden, tp))
    return classes


def kv_heads_held(kv_heads: int, tp: int) -> int:
    """KV heads over all ranks after LMDeploy repeats them to a multiple of ``tp``."""
    return round_up(kv_heads, tp)


def lm_head_rows(text: TextDims, tp: int) -> int:
    """Vocabulary rows of lm_head, padded where it is split. Tied embeddings are still copied."""
    return round_up(text.vocab, _VECTOR * tp) if tp > 1 else text.vocab


def ffn_width(
    intermediate: int, tp: int, quantization: Quantization | None, constants: EngineConstants
) -> int:
    """Intermediate width over all ranks, padded to the kernels' blocks."""
    align = constants.ffn_align_16bit  # lmdeploy builders/ffn.py::_pad_ffn_for_tp #23728b
    if quantization is not None and not quantization.of_experts:
        align = lcm(constants.ffn_align_grouped, quantization.group_size)
    return round_up(intermediate, align * tp)


def expert_width(
    intermediate: int,
    tp: int,
    quantization: Quantization | None,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """The same of an expert."""
    if quantization is None:
        return round_up(intermediate, constants.expert_format(capability).align * tp)
    align = constants.packed_format(quantization, capability).align
    if align is None:
        return ffn_width(intermediate, tp, quantization, constants)
    return round_up(intermediate, align * tp)


def vision_tp(vision: VisionDims, tp: int) -> int:
    """Ranks that the tower's attention is split over: 1 (replicated) where heads do not divide."""
    return tp if vision.heads % tp == 0 else 1


class _Packing(NamedTuple):
    """A quantisation as one kind of card holds it."""

    quantization: Quantization
    packed: PackedFormat


def _widens_heads(quantization: Quantization, head_dim: int) -> bool:
    """Whether scales of whole blocks of outputs do not turn with heads of this size.

    They become 16 bits then. lmdeploy turbomind/models/utils.py::reorder_rotary_emb #cad65f
    """
    return quantization.method == "fp8" and quantization.group_size % head_dim != 0


def _linear(inputs: int, outputs: int, packing: _Packing | None) -> int:
    """Bytes of a weight as the engine holds it: packed with scales and zeros, else at 16 bits."""
    elements = inputs * outputs
    if packing is None:
        return elements * 2
    groups = packing.packed.groups(elements, packing.quantization.group_size)
    return elements * packing.quantization.bits // 8 + int(groups * packing.packed.group)


def packed_elements(model: Model, tp: int, constants: EngineConstants) -> int:
    """Elements of one rank's linears that are stored packed."""
    if model.quantization is None or model.quantization.of_experts:
        return 0
    text = model.text
    plain = replace(model, quantization=None, vision=None)
    classes = weight_classes(plain, tp, constants)
    outputs = text.attention_layers * _qkv_rows(text, tp)
    dense = classes["attention"] + classes["mlp"] - (outputs * 2 if text.qkv_bias else 0)
    if _widens_heads(model.quantization, text.head_dim):
        dense -= outputs * text.hidden * 2
    if text.delta is not None:
        dense += text.delta.layers * text.delta.values // tp * text.hidden * 2
    return dense // 2


def _attention(text: TextDims, tp: int, packing: _Packing | None) -> Iterator[int]:
    """One layer's attention: fused QKV split by heads, output projection split by its input.

    Of latents: into them whole; out of them folded into what comes after, at 16 bits, with the
    output's rows padded to the keys' channels. lmdeploy builders/mla.py::fold_kv_b #5bb339
    """
    mla = text.mla
    if mla is not None:
        heads = text.heads * text.head_dim // tp
        yield _linear(text.hidden, mla.q_rank + text.head_dim, None)
        yield _linear(mla.q_rank or text.hidden, heads, None)
        yield _linear(heads, text.hidden, None)
        return
    qkv = _qkv_rows(text, tp)
    widened = packing is not None and _widens_heads(packing.quantization, text.head_dim)
    yield _linear(text.hidden, qkv, None if widened else packing)
    yield _linear(text.heads * text.head_dim // tp, text.hidden, packing)
    if text.qkv_bias:
        yield qkv * 2
    if text.output_bias:
        yield text.hidden * 2
    if text.sinks:
        yield text.heads // tp * 2


def _qkv_rows(text: TextDims, tp: int) -> int:
    """One rank's outputs of the fused queries, keys and values, and of an output gate."""
    queries = text.heads * (2 if text.output_gate else 1)
    return (queries + 2 * kv_heads_held(text.kv_heads, tp)) * text.head_dim // tp


def _delta(text: TextDims, delta: DeltaDims, tp: int, packing: _Packing | None) -> Iterator[int]:
    """One layer's delta net, split by heads.

    The input projections are one matrix, at 16 bits, since the two gates have too few outputs to be
    packed. lmdeploy builders/deltanet.py::fuse_gdn #e0a1b5
    """
    yield _linear(text.hidden, input_rows(delta) // tp, None)
    yield _linear(delta.values // tp, text.hidden, packing)
    yield delta.channels * delta.kernel // tp * 2
    # Decay, bias and a norm: so small that what each is rounded up to counts.
    for small in (delta.value_heads // tp, delta.value_heads // tp, delta.value_dim):
        yield round_up(small * 2, _POOL_BLOCK)


def _unpacked(model: Model) -> int:
    """Bytes of layers that a quantised checkpoint left at 16 bits, but for those widened anyway."""
    extra, text, quantization = unpacked_bytes(model), model.text, model.quantization
    if not extra or quantization is None or text.delta is None:
        return extra
    widened = {"delta.qkv", "delta.z"}
    if _widens_heads(quantization, text.head_dim):
        widened |= {"q", "k", "v"}
    exempt = exempt_bytes(text, "float16", quantization)
    return max(0, extra - sum(exempt.get(name, 0) for name in widened))


def _mlp(
    text: TextDims,
    tp: int,
    packing: _Packing | None,
    constants: EngineConstants,
    capability: tuple[int, int],
) -> int:
    """All layers' feed-forward networks, dense and experts."""
    quantization = packing.quantization if packing else None

    def ffn(intermediate: int) -> int:
        width = ffn_width(intermediate, tp, quantization, constants) // tp
        bias = (2 * width + text.hidden) * 2 if text.mlp_bias else 0
        return (
            _linear(text.hidden, 2 * width, packing) + _linear(width, text.hidden, packing) + bias
        )

    moe = text.moe
    if moe is None:
        return ffn(text.intermediate) * text.layers
    width = expert_width(moe.intermediate, tp, quantization, constants, capability) // tp
    router = (text.hidden + moe.router_bias) * 2
    expert_layer = moe.experts * (_expert(text, width, packing) + router)
    if moe.shared_intermediate:
        expert_layer += ffn(moe.shared_intermediate) + (text.hidden * 2 if moe.shared_gate else 0)
    if moe.correction:
        expert_layer += moe.experts * 4
    return expert_layer * moe.layers + ffn(text.intermediate) * (text.layers - moe.layers)


def _expert(text: TextDims, width: int, packing: _Packing | None) -> int:
    """One expert of one rank's width, each tensor in whole blocks of the driver's pools.

    The grouped kernels have a copy of a layer's biases besides. Seen on pretend GPUs (gpt-oss).
    """
    biases = [2 * width * 2, text.hidden * 2] if text.mlp_bias else []
    weights = [_linear(text.hidden, 2 * width, packing), _linear(width, text.hidden, packing)]
    return sum(round_up(size, _POOL_BLOCK) for size in (*weights, *biases)) + sum(biases)


def _vision(vision: VisionDims, tp: int, constants: EngineConstants) -> Iterator[int]:
    """The tower: attention and MLP split where they divide, embeddings and norms replicated."""
    hidden = vision.hidden
    norm = hidden * (2 if vision.norm == "layer_norm" else 1)
    patch_in = vision.channels * vision.temporal_patch * vision.patch_size**2
    yield patch_in * hidden * 2
    if vision.kind in ("internvit", "qwen3vit"):
        learnt = 1 if vision.kind == "internvit" else 0  # a CLS token, with a position of its own
        positions = vision_side(vision) ** 2 + learnt
        yield (hidden + learnt * hidden + positions * hidden) * 2  # the patches' bias before them
    block = 2 * norm * 2 + sum(_vision_block(vision, tp, constants))
    if vision.kind == "internvit":
        block += 2 * hidden * 2  # the two layer scales
    if vision.kind == "qwen3vit":
        small = [hidden * 2] * 6 + [vision_mlp_width(vision, tp) // tp * 2]
        block += sum(round_up(size, _POOL_BLOCK) - size for size in small)  # norms and biases
    yield block * vision.layers


def vision_side(vision: VisionDims) -> int:
    """Patches along a tile's side."""
    return (vision.image_size or 0) // vision.patch_size


def _vision_block(vision: VisionDims, tp: int, constants: EngineConstants) -> Iterator[int]:
    """Attention and MLP of a layer."""
    ranks = vision_tp(vision, tp)
    head_dim = constants.vision_head_dims.get(vision.head_dim, vision.head_dim)
    width = vision.heads * head_dim // ranks
    yield vision.hidden * 3 * width * 2
    yield width * vision.hidden * 2
    yield vision.hidden * 2  # output bias, on every rank
    if vision.qkv_bias:
        yield 3 * width * 2
    if vision.qk_norm:
        yield 2 * vision.hidden // ranks * 2
    inner = vision_mlp_width(vision, tp) // tp
    yield (2 if vision.gated_mlp else 1) * (vision.hidden * inner + inner) * 2
    yield (inner * vision.hidden + vision.hidden) * 2


def vision_mlp_width(vision: VisionDims, tp: int) -> int:
    """The tower's intermediate width over all ranks; Qwen2's is padded to vectors of each rank."""
    if vision.kind in ("internvit", "qwen3vit"):
        return vision.intermediate
    return round_up(vision.intermediate, _VECTOR * tp)


def _projector(vision: VisionDims, hidden: int, tp: int) -> Iterator[int]:
    """InternVL's mlp1 or Qwen's merger: two linears, the first split by output."""
    merged = vision.hidden * vision.merge**2
    inner = hidden if vision.kind == "internvit" else merged
    normed = merged if vision.kind == "internvit" else vision.hidden
    yield normed * (2 if vision.norm == "layer_norm" or vision.kind == "internvit" else 1) * 2
    yield (merged * inner + inner) // tp * 2
    yield (inner // tp * hidden + hidden) * 2


def input_rows(delta: DeltaDims) -> int:
    """Outputs of the fused input projections: queries, keys, values, output gate, two gates."""
    return delta.channels + delta.values + 2 * delta.value_heads


def temporary_bytes(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """Bytes per rank of weight preparation that are still held when free memory is read.

    TurboMind frees the last cast or repack without a synchronisation before it asks: lm_head as
    stored where its dtype is cast (in 0.16 and 0.17 on Hopper always a copy), or the widest
    repacked linear, with what scales took more while loading. Experts are repacked at 16 bits, too.
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
        temporary: float = constants.expert_format(capability).temporary
        if quantization is not None and quantization.of_experts:
            temporary = constants.packed_format(quantization, capability).temporary
        repack = int(text.hidden * 2 * width // settings.tp * temporary)
    if quantization is not None and not quantization.of_experts:
        packed = constants.packed_format(quantization, capability)
        dense = _widest_dense(model, settings.tp, constants)
        repack = max(repack, int(dense * packed.temporary))
        # One page more than the tensor: its scales share a page with what is freed beside them.
        repack += PAGE
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
    its contiguous shard, or whole again where it is padded or cast. A wide layer can take more: its
    raw linears, gate and up joined, and their shards.
    Source: lmdeploy builders/_base.py::_copy_shard_to_param #70955c
    """
    text, tp = model.text, settings.tp
    stored = DTYPE_BYTES[model.dtype]
    embedding = round_up(text.vocab * text.hidden * stored, PAGE)
    copied = lm_head_rows(text, tp) != text.vocab or settings.dtype != model.dtype
    copy = lm_head_rows(text, tp) * text.hidden * stored // (1 if copied else tp)
    lm_head = embedding + round_up(copy, PAGE)
    widest = text.intermediate
    if text.moe is not None and text.moe.layers == text.layers:
        widest = max(text.moe.intermediate, text.moe.shared_intermediate)
    gate, copies = text.hidden * widest, constants.load_layer
    shards = copies["shards"] / tp if tp > 1 else 0.0
    layer = gate * stored * (copies["whole"] + shards)
    if model.quantization is not None:
        layer = gate * copies["packed"]
    return embedding + max(lm_head, round_up(int(layer), PAGE) + PAGE)
