"""The weights of one rank of the PyTorch engine, by class.

Attention, delta nets and MLPs are sharded, in the decoder and in the vision tower. Embeddings,
head, norms, patch embedding and projector are whole on every rank, and nothing is padded.
There are exceptions. With latent attention, embeddings and head are sharded, too. The projectors of
Qwen3-VL, and of InternVL in Transformers' format, are sharded. Head and tower of Kimi-K2.5 are
whole. Source:
lmdeploy nn/embedding.py::ParallelEmbedding.__init__ `is_tp: bool = False`
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby
from math import prod
from operator import itemgetter
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from turbofit.core.model import DTYPE_BYTES, AudioDims, Draft, Model, TextDims, VisionDims
from turbofit.core.plan import GpuLedger, Settings
from turbofit.core.struct import Struct
from turbofit.core.units import FLOAT, HALF, MIB, round_up
from turbofit.core.version import REFERENCE
from turbofit.machine.kernels.census import torch_takes_a_share
from turbofit.memory.calibrated import BUFFERS
from turbofit.memory.versions import figures
from turbofit.model.drafts import EAGLE3, draft_tensors
from turbofit.model.families.engines import PROJECTOR_AS_TEXT
from turbofit.model.parameters import is_packed, packed_bytes, unpacked_bytes
from turbofit.model.tensors import Tensor, elements, linears, text_tensors
from turbofit.model.towers import audio_tensors, tower_tensors, vision_tensors

#: Terms and phases that are not in torch's allocator.
_BEFORE: Final = ("before", "context")
OUTSIDE_TORCH: Final = frozenset({"kernel_modules", "packed_kernels", BUFFERS})
#: The least bytes beside the plan's peak that torch's allocator may take of a card.
_LEAST_ROOM: Final = 128 * MIB
#: The smallest block and segment of torch's allocator.
_SMALLEST_BLOCK: Final = 512
_PAGE: Final = 2 * MIB
#: The least result where `unusable_between` was not compared with an engine. It is above the most,
#: 263 MiB, that 40 starts of 11 models showed on pretend GPUs.
_NOT_SEEN: Final = 298 * MIB
#: How tensors are cut that are parts of one module.
_JOINED: Final = ("columns", "kv_heads")
#: The place of modules outside the layers: before them.
_OUTSIDE: Final = -1
#: The compute capability on which TurboMind's kernels multiply AWQ's packed weights. Source:
#: lmdeploy cuda/awq_modules.py::_is_turbomind_gemm_capability_supported #7d9834
_COPIED_ON = (9, 0)
#: The group size of AWQ that these kernels take.
_COPIED_GROUP = 128
#: Bytes of a head's row in the three tables of a draft (`draft_weights`).
_MAPPED = 3 * 8
#: Sharded rows of the vocabulary are padded to a multiple of `VOCAB_ROWS`.
VOCAB_ROWS = 64  # lmdeploy nn/embedding.py::DEFAULT_VOCAB_PADDING_SIZE #3b77b2
#: Models with routers of 32 bits, corrections included. Source:
#: lmdeploy models/glm4_moe.py::Glm4MoE `dtype=torch.float32`
_FLOAT_ROUTERS = frozenset({"Glm4MoeForCausalLM"})
#: The model with latent attention that drops ``kv_b``, and has a whole head. Source:
#: lmdeploy models/kimi_k2_language.py::KimiK2Attention.__init__ #590e26
_KIMI = "KimiK2ForCausalLM"
#: Towers that are whole on every rank. Source:
#: lmdeploy models/kimi_k25_vision.py::MoonViTEncoderLayer.__init__ #7cc25d
WHOLE_TOWERS = frozenset({"moonvit"})
#: Models with checkpoints that store the experts of a layer in one tensor.
_ONE_TENSOR = frozenset({"Llama4ForCausalLM", "GptOssForCausalLM"})
#: The class of a tensor, by the tensor's part; a tensor that is neither linear nor embedding counts
#: as a norm.
_CLASSES: Final = {
    "embedding": "embedding", "head": "lm_head", "attention": "attention", "delta": "delta",
    "mlp": "mlp", "expert": "mlp", "shared": "mlp",
}  # fmt: skip


class PytorchConstants(Struct):
    """The constants of one generation, in bytes unless the name says otherwise.

    The YAML file has the meaning and the source of each figure, and its sign (over or under).
    """

    version: str
    page: int
    cublas_workspaces: int
    cublas_workspace: dict[str, int]
    segment: int
    live_fragmentation: dict[str, float]
    kernel_modules: int
    nccl_buffers: dict[str, int]
    packed_copy: dict[str, float]
    logit: int
    logit_few: int
    sampling_base: int
    token_elements: int
    prefill_base: int
    hidden_copies: int
    kernel_tuning: int
    vision_copies: dict[str, int]
    vision_base: int
    host_process: int
    least_blocks: int


@cache
def load_constants(version: str = REFERENCE) -> PytorchConstants:
    return figures("pytorch", version, PytorchConstants)


def segments(settings: Settings) -> str:
    """Return the kind of torch's segments: ``fixed`` for Ray's workers, or ``expandable``."""
    default = "uni" if settings.tp == 1 else "ray"
    return "fixed" if (settings.distributed_executor_backend or default) == "ray" else "expandable"


def environment(settings: Settings, model: Model, share: float | None = None) -> dict[str, str]:
    """Return variables for the engine's processes; torch takes at most ``share`` of a card.

    LMDeploy's check of the environment is off, since the check starts a process with a CUDA
    context. Expandable segments leave little unusable memory between weights and activations.
    States of delta nets have 16 bits, as the plan counts.
    """
    env = {"LMDEPLOY_ENABLE_CHECK_ENV": "0"}
    if model.text.delta is not None:
        env["LMDEPLOY_FP32_MAMBA_SSM_DTYPE"] = "0"
    if segments(settings) == "expandable":
        limit = f",per_process_memory_fraction:{share:.4f}" if share and share < 1 else ""
        limit = limit if limit and torch_takes_a_share() else ""
        env["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:True{limit}"
    return env


def share_of(ledgers: Sequence[GpuLedger]) -> float:
    """Return the share of a card for torch's allocator: the plan's peak and half the margin.

    Torch grows until memory is refused, and then frees cached blocks. Without a limit, memory is
    refused only when the card is full and has no memory for a library. On pretend GPUs, two plans
    died with the peak as limit, since torch refuses a block by the block's whole size. With half of
    the margin in addition, the two plans served, and used at most 16 MiB more than the peak. The
    part of the margin that a budget withholds is not available. All GPUs of a group get the share
    of the fullest card, which is too high for emptier cards.
    """
    shares = []
    for ledger in ledgers:
        lines = ledger.terms
        # What is not in torch's allocator, before the weights and after the cache, does not count.
        early = sum(t.bytes for t in lines if t.phase in _BEFORE)
        late = sum(t.bytes for t in lines if t.term in OUTSIDE_TORCH)
        held = max(ledger.load_peak, ledger.peak - late) - early
        room = max((ledger.margin - ledger.beyond_budget) // 2, _LEAST_ROOM)
        shares.append((held + room) / ledger.usable)
    return max(shares)


@lru_cache
def unusable_between(model: Model, tp: int) -> int:
    """Return the bytes of torch's fixed segments that lie unusable between one rank's weights.

    The rule of torch's allocator is followed for each module in the order of the layers, without
    biases. Packed weights, delta nets and one rank were not compared with an engine, and with a
    draft that has experts this was 169 to 255 MiB under: there the result is at least `_NOT_SEEN`,
    so over.
    """
    walked = _unusable(list(_blocks_on_rank(model, tp)))
    plain = model.quantization is None and model.text.delta is None and not model.draft
    return walked if plain and tp > 1 else max(walked, _NOT_SEEN)


def _blocks_on_rank(model: Model, tp: int) -> Iterator[int]:
    """Yield the bytes on one rank of each module: the towers', then the language model's.

    The engine joins what is cut by columns: queries, keys and values, and gate and up.
    """
    of_text = [
        (one, _bytes_on_rank(model, replace(one, bias=False), tp))
        for one in text_tensors(model.text)
    ]
    for group in (_towers_on_rank(model, tp), of_text):
        placed = defaultdict[int, list[tuple[str, int]]](list)
        for one, size in group:
            layers = one.layers or (_OUTSIDE,)
            module = one.part if one.split in _JOINED else one.role
            part = module, size // len(layers)
            for layer in layers:
                placed[layer].append(part)
        for layer in sorted(placed):
            for _, tensors in groupby(placed[layer], itemgetter(0)):
                yield sum(size for _, size in tensors)


def _towers_on_rank(model: Model, tp: int) -> list[tuple[Tensor, int]]:
    """Return the tensors of the towers, each with its bytes on one rank in all layers."""
    vision = model.vision
    if vision is None:
        return []
    share = 1 if vision.kind in WHOLE_TOWERS else _heads_share(vision.heads, tp)
    return [
        (one, int(one.weights * (1 if one.split == "whole" else share)) * HALF)
        for one in tower_tensors(vision, model.text.hidden)
    ]


def _unusable(sizes: Sequence[int]) -> int:
    """Return the bytes of fixed segments that blocks of ``sizes``, one after the other, leave.

    The rule is that of c10/cuda/CUDACachingAllocator.cpp: best fit, else a new segment, of 2 MiB
    for blocks of at most 1 MiB, of 20 MiB for those below 10 MiB, and else of the block's own size.
    A rest stays usable if it has one of the smallest blocks, or more than 1 MiB.
    """
    held = 0
    small: list[int] = []
    large: list[int] = []
    for size in sizes:
        block = round_up(size, _SMALLEST_BLOCK)
        free = small if block <= MIB else large
        place = bisect_left(free, block)
        if place < len(free):
            room = free.pop(place)
        else:
            room = round_up(block, _PAGE) if block <= MIB or block >= 10 * MIB else 20 * MIB
            held += room
        if room - block > (0 if free is small else MIB):
            insort(free, room - block)
    return held - sum(sizes)


def kv_heads_held(kv_heads: int, tp: int) -> int:
    """Return the KV heads of all ranks together; more ranks than heads repeat the heads."""
    return max(kv_heads, tp)


@lru_cache
def weight_classes(model: Model, tp: int) -> Mapping[str, int]:
    """Return one rank's weight bytes by class; a weight without quantisation has 16 bits."""
    classes = dict.fromkeys(("embedding", "lm_head", "attention", "mlp", "norms", "delta"), 0)
    for tensor in text_tensors(model.text):
        linear = tensor.packs or tensor.part in ("embedding", "head", "delta")
        classes[_CLASSES[tensor.part] if linear else "norms"] += _bytes_on_rank(model, tensor, tp)
    if model.text.cached_latent is not None and model.text.architecture != _KIMI:
        # The second copy of ``kv_b``, for queries and outputs, always has 16 bits.
        # lmdeploy models/deepseek_v2.py::DeepseekV2BMM.create_weight #1e5d85
        absorbed = sum(one.weights for one in linears(model.text) if one.role == "kv_b") * HALF
        classes["attention"] += absorbed // tp
    classes["unpacked"] = -(-unpacked_bytes(model) // tp)
    classes["forgotten"] = _forgotten(model, tp)
    if model.vision is not None:
        classes |= _tower_classes(model, model.vision, tp)
    return {name: size for name, size in classes.items() if size}


def _bytes_on_rank(model: Model, tensor: Tensor, tp: int) -> int:
    """Return the bytes on one rank of ``tensor`` in all layers."""
    text = model.text
    if tensor.part in ("embedding", "head"):
        whole_head = tensor.part == "head" and text.architecture == _KIMI
        return rows_held(text, 1 if whole_head else tp) * text.hidden * HALF
    if tensor.packs:
        share = _share(model, tensor, tp)
        # The bias of a row-wise layer is whole on every rank.
        spread = 1.0 if tensor.split == "rows" else share
        packed = model.quantization
        weights = (
            tensor.weights * min(HALF, DTYPE_BYTES[model.dtype])
            if packed is None or not is_packed(tensor, packed)
            else packed_bytes(tensor, packed)
        )
        return int(weights * share) + int(tensor.biases * spread) * HALF
    size = tensor.elements * _width(text, tensor)
    return size // tp if tensor.part == "delta" and tensor.split == "columns" else size


def _width(text: TextDims, tensor: Tensor) -> int:
    """Return the bytes of one element in a tensor that quantisation never packs.

    Two biases of a delta net's value head have 32 bits. The first forward keeps a decay of 32 bits,
    too. Source: lmdeploy pytorch/models/qwen3_5.py::Qwen3_5GatedDeltaNet.make_params #73dd14
    """
    if tensor.role == "delta.decay":
        return 2 * FLOAT
    float_router = tensor.part == "router" and text.architecture in _FLOAT_ROUTERS
    return FLOAT if float_router or tensor.role == "delta.step" else HALF


def _tower_classes(model: Model, vision: VisionDims, tp: int) -> dict[str, int]:
    """Return the bytes of the towers on one rank, by class."""
    tensors = vision_tensors(vision, model.text.hidden)
    split = () if vision.kind in WHOLE_TOWERS else tensors
    sharded = sum(tensor.weights for tensor in split if tensor.split != "whole")
    mergers = 0
    # lmdeploy models/qwen3_vl.py::Qwen3VLVisionPatchMerger.__init__ #d99d15
    # lmdeploy models/internvl3_hf.py::InternVLMultiModalProjector.__init__ #302d9e
    if vision.kind == "qwen3vit" or model.architecture in PROJECTOR_AS_TEXT:
        linear = (t for t in tensors if t.part == "projector" and len(t.shape) > 1)
        mergers = sum(tensor.weights for tensor in linear)
    classes = {
        "vision": int(sharded * _heads_share(vision.heads, tp) + mergers / tp) * HALF,
        "vision.whole": (elements(tensors) - sharded - mergers) * HALF,
    }
    if vision.audio is not None:
        classes["audio"] = _audio_bytes(vision.audio, model.text.hidden, tp)
    return classes


def _share(model: Model, linear: Tensor, tp: int) -> float:
    """Return the fraction of linear layers of one role that the fullest rank holds."""
    if linear.split == "whole":
        return 1.0
    if model.text.moe is not None and linear.part == "expert":
        return expert_channels(model, tp) / model.text.moe.intermediate
    return _repeat(model.text, linear, tp) / tp


def _repeat(text: TextDims, linear: Tensor, tp: int) -> float:
    """Return the number of copies of ``linear`` on all ranks together.

    The number exceeds 1 only for keys and values, with more ranks than KV heads.
    """
    return kv_heads_held(text.kv_heads, tp) / text.kv_heads if linear.split == "kv_heads" else 1.0


def expert_channels(model: Model, tp: int) -> int:
    """Return the intermediate channels of an expert on the rank with the most; 0 without experts.

    Experts in fp8 are divided in whole groups. If the groups do not divide evenly, each of the
    first ranks has an additional group.
    lmdeploy nn/moe/blocked_fp8.py::LinearWeightsBlockedF8._chunk_weight_tp #f5c577
    """
    moe, packed = model.text.moe, model.quantization
    if moe is None:
        return 0
    group = packed.group_size if packed is not None and packed.method == "fp8" else 1
    return round_up(moe.intermediate, group * tp) // tp


def _forgotten(model: Model, tp: int) -> int:
    """Return the bytes of a dense model that Qwen3-VL's class with experts makes, then replaces.

    On several ranks, the dense model's layers refer to themselves (``weight_loader``). Python then
    keeps the layers: in two rehearsals, to the end. The figure is too high if Python's garbage
    collector frees the layers. Source:
    lmdeploy models/qwen3_vl_moe.py::Qwen3VLMoeForConditionalGeneration.__init__ #bf8fff
    """
    if model.architecture != "Qwen3VLMoeForConditionalGeneration" or tp == 1:
        return 0
    text = replace(model.text, moe=None, tie_word_embeddings=True)
    dense = replace(model, architecture="", text=text, vision=None, quantization=None)
    return sum(weight_classes(dense, tp).values())


def rows_held(text: TextDims, tp: int) -> int:
    """Return the rows of the vocabulary on one rank: all, or a part if embeddings are sharded.

    Source: lmdeploy models/deepseek_v2.py::DeepseekV2Model.__init__ #db35b1
    """
    return round_up(text.vocab, VOCAB_ROWS) // tp if text.cached_latent and tp > 1 else text.vocab


def _audio_bytes(audio: AudioDims, text_hidden: int, tp: int) -> int:
    """Return the bytes of the audio tower on one rank: its attention is sharded, the rest whole.

    lmdeploy models/qwen3_omni_moe_thinker.py::Qwen3OmniMoeAudioEncoderLayer.__init__ #7477d6
    """
    tensors = audio_tensors(audio, text_hidden)
    sharded = sum(
        tensor.weights + (tensor.biases if tensor.split == "columns" else 0)
        for tensor in tensors
        if tensor.part == "attention"
    )
    shared = int(sharded * _heads_share(audio.heads, tp))
    return (shared + elements(tensors) - sharded) * HALF + audio.position_bytes


def _heads_share(heads: int, tp: int) -> float:
    """Return the fraction of the heads that the fullest rank holds; a head is never divided."""
    return -(-heads // tp) / heads


def largest_loaded(model: Model, tp: int) -> int:
    """Return the most bytes of tensors that are on the card in addition to the final weights.

    At tp 1, tensors are copied directly to the final weights; a tied head is made, then dropped.
    With more ranks, a row-wise layer arrives whole on each rank. 16-bit experts are copied to a new
    layout, one layer at a time; the old layout is freed later. Seen on pretend GPUs. Source:
    lmdeploy linear/default.py::BaseLinear._weight_loader_tp_rowwise #76002c
    lmdeploy cuda/moe/default.py::TritonFusedMoEImpl.update_weights #1fab2a
    lmdeploy pytorch/models/gpt_oss.py::GptOssForCausalLM._load_weight_experts #f4ee8a
    """
    text, moe, experts = model.text, model.text.moe, 0
    tied = text.vocab * text.hidden * HALF if text.tie_word_embeddings else 0
    if moe is not None and text.architecture in _ONE_TENSOR:  # gate and up, before the ranks' split
        experts = moe.experts * text.hidden * 2 * moe.intermediate * HALF
    if moe is not None and model.quantization is None:  # all experts of a layer
        experts = max(experts, moe.experts * 3 * text.hidden * moe.intermediate * HALF // tp)
    if tp == 1:
        return max(tied, experts)
    delta = text.delta.values if text.delta else 0
    inner = text.heads * (text.mla.v_dim if text.mla else text.head_dim)
    down = text.hidden * max(text.intermediate, inner, delta) * HALF
    rows = rows_held(text, tp) * text.hidden * HALF if text.cached_latent else 0
    return max(tied + down, rows, experts)


def own_draft_weights(model: Model, draft: Draft, tp: int) -> int:
    """Return the bytes on one rank of a draft that is layers of the model's checkpoint.

    Its layers are divided as the model's. What joins a token's embedding and its state is whole on
    every rank, at 16 bits. DeepSeek's class also has embeddings, whole on every rank, and a head.
    The figure is too high if 4-bit weights have 4 bits in the draft, too. Source:
    lmdeploy models/qwen3_5_mtp.py::Qwen3_5MultiTokenPredictor.__init__ #7b4fb5
    lmdeploy models/deepseek_mtp.py::DeepSeekMultiTokenPredictorLayer.__init__ #f114c4
    """
    text, packed = draft.text, model.quantization
    if packed is not None:
        exempt = [name for name in packed.unconverted if "mtp" in name and ".fc" not in name]
        is_packed_too = packed.method == "fp8" and not exempt
        packed = replace(packed, unconverted=()) if is_packed_too else None
    alone = replace(model, text=text, vision=None, quantization=packed, draft=UNSET)
    classes = weight_classes(alone, tp)
    layers = sum(classes.values()) - classes["embedding"] - classes["lm_head"]
    joins, norms = 2 * text.hidden, 2
    embeddings = text.vocab if draft.embeds else 0
    head = round_up(draft.head_rows, VOCAB_ROWS) // tp
    parts = text.layers if draft.embeds else 1  # each layer of DeepSeek's class has all of them
    return layers + parts * (joins + norms + embeddings + head) * text.hidden * HALF


def draft_weights(draft: Draft) -> int:
    """Return the bytes of a draft, which the first rank has whole, and other ranks have not.

    EAGLE-3's class first makes the projections of a plain layer, and frees these projections after
    the engine sizes the cache. Each row of the head has three entries of 64 bits: in the map to the
    base's vocabulary, and as a word and a bit for grammars. Source:
    lmdeploy pytorch/spec_decode/__init__.py::build_spec_agent #bb0341
    lmdeploy models/llama_eagle3.py::Eagle3LlamaDecoderLayer.__init__ #4e5c93
    """
    text, replaced = draft.text, 0
    if draft.algorithm == EAGLE3:
        replaced = (text.heads + 2 * text.kv_heads) * text.head_dim * text.hidden
    tensors = sum(prod(shape) for shape in draft_tensors(draft).values())
    return (tensors + replaced) * HALF + draft.head_rows * _MAPPED


def draft_staged(draft: Draft) -> int:
    """Return the bytes of embeddings that are made for a draft, and dropped for the base's."""
    return 0 if draft.embeds else draft.text.vocab * draft.text.hidden * HALF


def is_copied(model: Model, capability: tuple[int, int]) -> bool:
    """Return whether TurboMind's kernels multiply AWQ's weights, from a copy in a new layout."""
    quantization = model.quantization
    return (
        capability == _COPIED_ON
        and quantization is not None
        and (quantization.method, quantization.group_size) == ("awq", _COPIED_GROUP)
    )


def packed_copy(
    model: Model, tp: int, capability: tuple[int, int], constants: PytorchConstants
) -> int:
    """Return the bytes on one rank of AWQ's weights in the layout of TurboMind's kernels.

    The bytes are those of a second copy. The figure is an upper bound: the kernels refuse layers of
    odd shapes, which then have no copy.
    """
    if not is_copied(model, capability):
        return 0
    held = sum(linear.weights * _repeat(model.text, linear, tp) for linear in linears(model.text))
    return int(held / tp * (0.5 + constants.packed_copy["group"] / _COPIED_GROUP))


def staged_copy(
    model: Model, tp: int, capability: tuple[int, int], constants: PytorchConstants
) -> int:
    """Return the bytes needed briefly while the widest layer (gate and up are joined) is copied."""
    if not is_copied(model, capability):
        return 0
    widest = 2 * model.text.hidden * model.text.intermediate // tp
    return int(widest * constants.packed_copy["staged"])
