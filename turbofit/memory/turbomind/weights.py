"""Bytes of one rank's weights by tensor class, and the additional memory of loading.

The functions follow LMDeploy's builders (`lmdeploy/turbomind/builders`, `models`), which split,
replicate, pad or repeat weights. The bytes are exact except for the pool's rounding, which callers
add.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from math import lcm, log2, prod, sqrt
from typing import Final, NamedTuple

from msgspec.structs import replace

from turbofit.core.model import (
    DTYPE_BYTES,
    Model,
    Quantization,
    TextDims,
    VisionDims,
)
from turbofit.core.plan import Settings
from turbofit.core.struct import Struct
from turbofit.core.units import FLOAT, HALF, grouped, round_up
from turbofit.core.version import REFERENCE
from turbofit.memory.account import HOPPER, PAGE
from turbofit.memory.versions import figures
from turbofit.model.parameters import exempt_bytes, is_packed, unpacked_bytes
from turbofit.model.tensors import Tensor, text_tensors
from turbofit.model.towers import vision_tensors

#: The 16-bit elements of a 16-byte vector. Each rank's lm_head rows are padded to whole vectors.
_VECTOR = 8
#: Bytes of a block: every allocation from a pool of CUDA takes whole blocks.
_POOL_BLOCK = 512
#: The class of a tensor, by the tensor's part.
_CLASSES: Final = {
    "embedding": "embedding", "attention": "attention", "delta": "delta", "norm": "norms",
    "mlp": "mlp", "expert": "mlp", "shared": "mlp", "router": "mlp",
}  # fmt: skip
#: Queries, keys and values, which rotary embeddings reorder by heads.
_TURNED: Final = frozenset({"q", "k", "v"})
#: The matrix of which a tensor becomes a part. The fused input projections of a delta net stay in
#: 16 bits, since its two gates have too few outputs for quantisation. Source:
#: lmdeploy builders/deltanet.py::fuse_gdn #e0a1b5
_JOINED: Final = {
    **dict.fromkeys(("q", "k", "v"), "qkv"),
    **dict.fromkeys(("q_a", "kv_a"), "latents"),
    **dict.fromkeys(("delta.qkv", "delta.z", "delta.b", "delta.a"), "delta.inputs"),
    **{f"{mlp}.{up}": f"{mlp}.up" for mlp in ("mlp", "expert", "shared") for up in ("gate", "up")},
}
#: Small tensors of delta nets, for which the rounding to whole blocks matters.
_SMALL: Final = frozenset({"delta.decay", "delta.step", "delta.norm"})


class PackedFormat(Struct):
    """The format of quantised linear layers on one kind of card, in bytes.

    ``group``: bytes of a group's scale and zero point in the engine; ``load_group``: these bytes
    while loading. ``temporary``: temporary bytes for each element. ``of``: elements with one scale
    in the kernels; a checkpoint's scale for more elements is repeated. ``align``: each rank's part
    of an expert has a multiple of ``align`` channels; None: the default alignment. ``input``: bytes
    of one element in a linear layer's quantised input; 0: the input is not quantised.
    """

    group: float
    load_group: float
    temporary: float
    of: int | None = None
    fused_silu: bool = False
    align: int | None = None
    input: float = 0.0

    def groups(self, elements: int, stored: int) -> int:
        """Return the number of groups that ``elements`` elements have in the kernels.

        A group of the checkpoint has ``stored`` elements.
        """
        return elements // (stored if self.of is None else min(stored, self.of))


class ExpertFormat(Struct):
    """The format of experts' linear layers on one kind of card, quantised or with 16 bits.

    ``align``: with 16 bits, each rank's part of an expert has a multiple of ``align`` channels.
    """

    temporary: int
    align: int = 32
    fused_silu: bool = False


class DeltaKernel(Struct):
    """The kernel of gated delta nets on one kind of card.

    A prompt is processed in chunks of ``chunk`` tokens, with a workspace; 0: no chunks and no
    workspace. Long sequences can be cut into segments of several chunks; the number of chunks in a
    segment is proportional to ``segment``. Sequences are cut if all together have at most
    ``cut_heads`` heads. If a sequence has at least ``cut_long_chunks`` chunks, the limit
    is ``cut_long_heads``.
    """

    dtypes: tuple[str, ...]
    chunk: int = 0
    segment: float = 0.0
    cut_heads: int = 0
    cut_long_heads: int = 0
    cut_long_chunks: int = 0

    def most_heads(self, longest: int) -> int:
        """Return the most heads, of all sequences together, at which sequences are still cut.

        ``longest`` is the number of chunks of the longest sequence.
        """
        if longest < self.cut_long_chunks:
            return self.cut_heads
        return max(self.cut_heads, self.cut_long_heads)

    def segment_chunks(self, heads: int, chunks: int, sm_count: int) -> int:
        """Return the number of chunks in a segment, a power of two."""
        scaled = sqrt(heads * chunks / sm_count) * self.segment
        return max(4, 1 << max(0, round(log2(max(1.0, scaled)))))


class EngineConstants(Struct):
    """The constants of one TurboMind generation, in bytes unless the name says otherwise.

    The YAML file has the meaning and the source of each figure, and its sign (over or under).
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
    #: The GEMM workspace, if it is made with the context: only in older generations.
    gemm_in_context: tuple[int, ...] = ()
    #: Only in older generations: the compute capabilities on which dense 16-bit linear layers are
    #: prepared through a copy.
    copied_16bit: tuple[int, ...] = ()

    def packed_format(
        self, quantization: Quantization, capability: tuple[int, int]
    ) -> PackedFormat:
        """Return the format of linear layers with a quantisation, on a card of a capability."""
        formats = self.packed.get(quantization.method, self.packed["int4"])
        return formats.get(f"{capability[0]}{capability[1]}", formats["default"])

    def expert_format(self, capability: tuple[int, int]) -> ExpertFormat:
        """Return the format of experts on a card of this compute capability."""
        return self.experts.get(f"{capability[0]}{capability[1]}", self.experts["default"])

    def delta_kernel(self, capability: tuple[int, int]) -> DeltaKernel | None:
        """Return the kernel of gated delta nets on a card of this capability, or None."""
        if capability < HOPPER:
            return self.delta_rule["before_90"]
        return self.delta_rule.get(f"{capability[0]}{capability[1]}")


@cache
def load_constants(version: str = REFERENCE) -> EngineConstants:
    return figures("turbomind", version, EngineConstants)


def weight_classes(
    model: Model,
    tp: int,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> dict[str, int]:
    """Return each tensor class's bytes per rank.

    The bytes of quantised tensors depend on the kind of card.
    """
    text, vision = model.text, model.vision
    classes = {**_text_classes(_rank(model, tp, constants, capability))}
    unpacked = _unpacked(model)
    if unpacked:
        classes["unpacked"] = -(-unpacked // tp)
    if vision is not None:
        head_dim = constants.vision_head_dims.get(vision.head_dim, vision.head_dim)
        classes |= _tower_classes(vision, text.hidden, tp, head_dim)
    return classes


def kv_heads_held(kv_heads: int, tp: int) -> int:
    """Return the KV heads over all ranks: LMDeploy repeats heads up to a multiple of ``tp``."""
    return round_up(kv_heads, tp)


def lm_head_rows(text: TextDims, tp: int) -> int:
    """Return the number of lm_head's rows over all ranks; several ranks have padded rows."""
    return round_up(text.vocab, _VECTOR * tp) if tp > 1 else text.vocab


def ffn_width(
    intermediate: int, tp: int, quantization: Quantization | None, constants: EngineConstants
) -> int:
    """Return the MLP's intermediate width over all ranks, padded to the kernels' blocks."""
    return round_up(intermediate, _ffn_align(quantization, constants) * tp)


def _ffn_align(quantization: Quantization | None, constants: EngineConstants) -> int:
    """Return the number of which a rank's channels of an MLP are a multiple."""
    if quantization is None or quantization.of_experts:
        return constants.ffn_align_16bit  # lmdeploy builders/ffn.py::_pad_ffn_for_tp #23728b
    return lcm(constants.ffn_align_grouped, quantization.group_size)


def expert_width(
    intermediate: int,
    tp: int,
    quantization: Quantization | None,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """Return an expert's intermediate width over all ranks, padded to the kernels' blocks."""
    return round_up(intermediate, _expert_align(quantization, constants, capability) * tp)


def _expert_align(
    quantization: Quantization | None, constants: EngineConstants, capability: tuple[int, int]
) -> int:
    """Return the number of which a rank's channels of an expert are a multiple."""
    if quantization is None:
        return constants.expert_format(capability).align
    align = constants.packed_format(quantization, capability).align
    return _ffn_align(quantization, constants) if align is None else align


def vision_tp(vision: VisionDims, tp: int) -> int:
    """Return the number of ranks that split the tower's attention; 1 if heads divide unevenly."""
    return tp if vision.heads % tp == 0 else 1


def _widens_heads(quantization: Quantization, head_dim: int) -> bool:
    """Return whether the engine widens fp8 attention layers with heads of this size to 16 bits.

    The engine widens layers if a scale's block has a part of a head: it cannot reorder such scales.
    lmdeploy turbomind/models/utils.py::reorder_rotary_emb #cad65f
    """
    return quantization.method == "fp8" and quantization.group_size % head_dim != 0


class _Joined(NamedTuple):
    """Tensors that form one matrix in memory, joined along the outputs.

    ``packing`` is the quantisation; None means 16 bits, even if the checkpoint stores fewer.
    """

    tensors: tuple[Tensor, ...]
    packing: Quantization | None
    times: int


@lru_cache
def _as_built(text: TextDims, quantization: Quantization | None) -> tuple[_Joined, ...]:
    """Return a language model's tensors without the head, joined to matrices as in the engine."""
    inside = [tensor for tensor in text_tensors(text) if tensor.part != "head"]
    joined = grouped((_JOINED.get(tensor.role, tensor.role), tensor) for tensor in inside)
    if text.mla is not None:
        joined = _folded(text, joined)
    return tuple(
        _Joined(tuple(group), _packing(group, text, quantization), group[0].count)
        for group in joined.values()
    )


def _packing(
    joined: Sequence[Tensor], text: TextDims, quantization: Quantization | None
) -> Quantization | None:
    """Return the quantisation that joined tensors have in the engine; None means 16 bits."""
    if quantization is None or not all(is_packed(one, quantization) for one in joined):
        return None
    turned = joined[0].role == "q" and _widens_heads(quantization, text.head_dim)
    return None if turned else quantization


def _folded(text: TextDims, joined: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return the tensors of attention to latents as the engine builds them, with 16 bits.

    Projections out of the latents are folded into the next projections. The output's rows are
    padded to the keys' channels. lmdeploy builders/mla.py::fold_kv_b #5bb339
    """
    heads = text.heads * text.head_dim
    query = "q_b" if "q_b" in joined else "qkv"
    shapes = {query: (heads, joined[query][0].shape[1]), "o": (text.hidden, heads)}
    del joined["kv_b"]
    plain = {"latents": [replace(one, packs=False) for one in joined["latents"]]}
    for name, shape in shapes.items():
        plain[name] = [replace(joined[name][0], shape=shape, packs=False)]
    return joined | plain


class _Rank(NamedTuple):
    """One rank's part of the language model: paddings, and the card's format of packed layers."""

    text: TextDims
    quantization: Quantization | None
    tp: int
    ffn_align: int
    expert_align: int
    packed: PackedFormat | None

    def bytes(self, joined: _Joined) -> int:
        """Return the bytes of one layer's matrix, or of the matrix of one expert.

        Experts take whole blocks of the driver's pools, and the grouped kernels have an additional
        copy of a layer's biases. Seen on pretend GPUs (gpt-oss).
        """
        size, first = self._weight(joined), joined.tensors[0]
        bias = sum([self._shape(one)[0] * HALF for one in joined.tensors if one.bias])
        if first.part == "expert":
            return round_up(size, _POOL_BLOCK) + round_up(bias, _POOL_BLOCK) + bias
        return round_up(size, _POOL_BLOCK) if first.role in _SMALL else size + bias

    def elements(self, joined: _Joined) -> int:
        return sum([prod(self._shape(one)) for one in joined.tensors])

    def _weight(self, joined: _Joined) -> int:
        """Return a weight's bytes in the engine, with scales and zero points if quantised."""
        elements, packing = self.elements(joined), joined.packing
        if packing is not None and self.packed is not None:
            groups = self.packed.groups(elements, packing.group_size)
            return elements * packing.bits // 8 + int(groups * self.packed.group)
        return elements * (FLOAT if joined.tensors[0].role == "correction" else HALF)

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of the rank's part of a tensor: outputs, then inputs."""
        first, *others = tensor.shape
        if tensor.split == "whole":
            return tensor.shape
        if tensor.split == "rows":
            return (first, self._channels(tensor, others[0]))
        return (self._channels(tensor, first), *others)

    def _channels(self, tensor: Tensor, channels: int) -> int:
        """Return the rank's share of channels, padded or repeated."""
        kv_heads = self.text.kv_heads
        if tensor.part in ("mlp", "shared"):
            channels = round_up(channels, self.ffn_align * self.tp)
        elif tensor.part == "expert":
            channels = round_up(channels, self.expert_align * self.tp)
        elif tensor.split == "kv_heads":
            channels = channels // kv_heads * kv_heads_held(kv_heads, self.tp)
        return channels // self.tp


def _rank(model: Model, tp: int, constants: EngineConstants, capability: tuple[int, int]) -> _Rank:
    packing = model.quantization
    return _Rank(
        model.text,
        packing,
        tp,
        _ffn_align(packing, constants),
        _expert_align(packing, constants, capability),
        constants.packed_format(packing, capability) if packing is not None else None,
    )


@lru_cache
def _text_classes(rank: _Rank) -> dict[str, int]:
    """Return the bytes of a rank's language model by class; cached, since a plan asks often."""
    text, tp = rank.text, rank.tp
    classes = dict.fromkeys(("embedding", "lm_head", "attention", "mlp", "norms"), 0)
    classes["lm_head"] = lm_head_rows(text, tp) * text.hidden * HALF // tp
    for joined in _as_built(text, rank.quantization):
        name = _CLASSES[joined.tensors[0].part]
        classes[name] = classes.get(name, 0) + rank.bytes(joined) * joined.times
    return classes


def _unpacked(model: Model) -> int:
    """Return the bytes of 16-bit layers in a quantised checkpoint.

    Layers that the engine widens to 16 bits in every checkpoint are not included.
    """
    extra, text, quantization = unpacked_bytes(model), model.text, model.quantization
    if not extra or quantization is None or text.delta is None:
        return extra
    widened = {"delta.qkv", "delta.z"}
    if _widens_heads(quantization, text.head_dim):
        widened |= _TURNED
    exempt = exempt_bytes(text, "float16", quantization)
    return max(0, extra - sum(exempt.get(name, 0) for name in widened))


@lru_cache
def _tower_classes(vision: VisionDims, text_hidden: int, tp: int, head_dim: int) -> dict[str, int]:
    """Return the bytes of a rank's tower by class; attention and MLP are split where possible."""
    tower, classes = _Tower(vision, tp, head_dim), {"vision": 0, "projector": 0}
    for tensor in vision_tensors(vision, text_hidden):
        name = "projector" if tensor.part == "projector" else "vision"
        classes[name] += tower.bytes(tensor) * tensor.count
    return classes


class _Tower(NamedTuple):
    """A rank's part of a vision tower; ``head_dim`` is the size that the kernels need."""

    vision: VisionDims
    tp: int
    head_dim: int

    def bytes(self, tensor: Tensor) -> int:
        """Return the rank's bytes of one tensor of the tower, with the bias."""
        shape = self._shape(tensor)
        bias = shape[0] if tensor.bias else 0
        if tensor.role == "projector.1":
            return (prod(shape) + bias) // self.tp * HALF
        sizes = [prod(shape) * HALF, bias * HALF]
        turned = tensor.role in _TURNED or tensor.layers is None
        if self.vision.kind == "qwen3vit" and not turned:  # norms and biases
            sizes = [round_up(size, _POOL_BLOCK) for size in sizes]
        return sum(sizes)

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of the rank's part of a tensor of the tower."""
        vision, ranks = self.vision, vision_tp(self.vision, self.tp)
        if tensor.role in ("q_norm", "k_norm"):
            return (vision.hidden // ranks,)
        if tensor.role == "projector.2":
            return (tensor.shape[0], tensor.shape[1] // self.tp)
        if tensor.part not in ("attention", "mlp"):
            return tensor.shape
        width = vision.heads * self.head_dim // ranks
        if tensor.part == "mlp":
            width = vision_mlp_width(vision, self.tp) // self.tp
        return (vision.hidden, width) if tensor.split == "rows" else (width, vision.hidden)


def vision_mlp_width(vision: VisionDims, tp: int) -> int:
    """Return the tower's MLP width over all ranks.

    The width of Qwen2-VL and Qwen2.5-VL is padded to whole vectors on each rank.
    """
    if vision.kind in ("internvit", "qwen3vit"):
        return vision.intermediate
    return round_up(vision.intermediate, _VECTOR * tp)


def temporary_bytes(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """Return the bytes per rank that preparing weights still holds when free memory is read.

    TurboMind frees the last cast or repacked tensor without a synchronisation; the driver still
    holds the freed memory. A cast frees lm_head as stored (0.16 and 0.17 always copy lm_head on
    Hopper). Repacking frees the widest linear layer, with the additional memory of scales while
    loading. 16-bit experts are repacked, too. The larger of the two tensors counts.
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
        # Queries, keys, values and output gates form one matrix, the widest apart from experts.
        # lmdeploy builders/attention.py::fuse_qkv #92dc38
        rank = _rank(model, settings.tp, constants, capability)
        built = [one for one in _as_built(text, quantization) if one.packing]
        dense = [rank.elements(one) for one in built if one.tensors[0].part != "expert"]
        repack = max(repack, int(max(dense, default=0) * packed.temporary))
        # One page more than the tensor: the scales share a page with memory freed at the same time.
        repack += PAGE
        repack += loading_extra(model, settings, constants, capability)
    return max(cast, repack)


def loading_extra(
    model: Model,
    settings: Settings,
    constants: EngineConstants,
    capability: tuple[int, int] = (8, 0),
) -> int:
    """Return the bytes per rank that quantised layers need while loading, but not afterwards."""
    quantization = model.quantization
    if quantization is None or quantization.of_experts:
        return 0
    packed = constants.packed_format(quantization, capability)
    if packed.load_group == packed.group:
        return 0
    rank = _rank(model, settings.tp, constants, capability)
    held = [joined for joined in _as_built(model.text, quantization) if joined.packing]
    elements = sum([rank.elements(joined) * joined.times for joined in held])
    groups = packed.groups(elements, quantization.group_size)
    return int(groups * (packed.load_group - packed.group))


def staging_bytes(model: Model, settings: Settings, constants: EngineConstants) -> int:
    """Return the bytes in torch's allocator on the group's first GPU until the export ends.

    Torch holds the whole embedding until the language model is built. At the same time lm_head
    passes: as stored, and as a contiguous shard, or as a second whole copy if lm_head is padded or
    cast. A wide layer can take more bytes than lm_head: the stored linear layers, with gate and up
    joined, and the shards.
    Source:
    lmdeploy builders/_base.py::_copy_shard_to_param #70955c
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
