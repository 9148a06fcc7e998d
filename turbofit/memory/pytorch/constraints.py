"""What the PyTorch engine asserts or refuses, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import round_up
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.pytorch.cache import KV_TYPES, RESERVED_BLOCKS, TURBO_QUANT
from turbofit.memory.pytorch.flash_attention import without_kernels
from turbofit.memory.pytorch.weights import VOCAB_ROWS, WHOLE_TOWERS, kv_heads_held
from turbofit.memory.shared_terms import AMPERE, capability_of

__all__ = [
    "cache_problem", "checkpoint_problem", "communicator_problem", "draft_problem",
    "missing_kernels", "settings_problem", "state_problem", "tp_problem",
]  # fmt: skip

#: The first compute capability with fp8 in Triton.
_FP8 = (8, 9)
#: `quant_policy` of a cache of that type.
_FP8_CACHE = 16

#: What does not repeat KV heads. Source: configurations/llava_hf.py, models/llama4.py.
_NO_REPEAT = frozenset(
    {
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "Llama4ForConditionalGeneration",
    }
)
#: Its tower deals out whole heads, unequally where they do not divide. Source: models/internvl.py.
_UNEQUAL_HEADS = "internvit"
#: Whose states are bfloat16, whatever the dtype.
_BFLOAT_STATES = "Qwen3NextForCausalLM"
#: Whose scales of a group are a rank's or another's, never of both.
_CUT_METHODS = frozenset({"awq", "fp8"})
#: The fewest tokens of a block that its kernels take. Source: messages.py, kernel_block_size.
_LEAST_BLOCK = 16
#: Tokens of a block, which LMDeploy stops without. Source: executor/base.py.
_FLASH_MLA_BLOCK = 64


def tp_problem(model: Model, tp: int) -> str | None:
    """Why this tensor-parallel degree cannot be; None where it can.

    Source: LMDeploy pytorch/nn/linear, configurations/builder.py, cache_engine/schema.py.
    """
    return next(_problems(model, tp), None)


def _problems(model: Model, tp: int) -> Iterator[str]:
    text, vision = model.text, model.vision
    if text.expands_latent and tp > 1:
        # models/minicpm3.py keeps kv_b whole and takes its outputs for a rank's heads.
        yield f"LMDeploy 0.18's class of {model.name} fails at its first forward on several ranks"
    if text.heads % tp:
        yield f"{text.heads} attention heads do not divide by {tp}"
    if text.kv_heads % tp and (tp % text.kv_heads or model.architecture in _NO_REPEAT):
        yield f"{text.kv_heads} KV heads cannot be dealt to {tp} ranks"
    if text.intermediate % tp:
        yield f"the MLP's {text.intermediate} channels do not divide by {tp}"
    if text.moe is not None and text.moe.shared_intermediate % tp:
        yield f"the shared expert's {text.moe.shared_intermediate} channels do not divide by {tp}"
    if text.moe is not None and text.moe.intermediate % tp:
        yield f"the experts' {text.moe.intermediate} channels do not divide by {tp}"
    if text.cached_latent is not None and round_up(text.vocab, VOCAB_ROWS) % tp:
        yield f"the vocabulary's {text.vocab} rows do not divide by {tp}"
    if text.delta is not None and text.delta.key_heads % tp:
        yield f"the delta nets' {text.delta.key_heads} key heads do not divide by {tp}"
    packed = model.quantization
    if text.moe is not None and packed is not None and packed.of_experts:
        each = text.moe.intermediate // tp
        if each % packed.group_size:
            yield f"{each} channels of an expert on each rank are no groups of {packed.group_size}"
    yield from _cut_groups(model, tp)
    if vision is None or vision.kind in WHOLE_TOWERS:
        return
    if vision.kind != _UNEQUAL_HEADS and vision.heads % tp:
        yield f"the vision tower's {vision.heads} heads do not divide by {tp}"
    if vision.intermediate % tp:
        yield f"the vision tower's {vision.intermediate} channels do not divide by {tp}"


def _cut_groups(model: Model, tp: int) -> Iterator[str]:
    """Layers of which a rank would get a part of a group: they fail while they are loaded.

    Experts of fp8 are dealt out in whole groups, however many a rank gets.
    Source: nn/linear/awq.py, nn/linear/blocked_fp8.py, nn/moe/blocked_fp8.py.
    """
    text, moe, packed = model.text, model.text.moe, model.quantization
    if packed is None or packed.method not in _CUT_METHODS:
        return
    layers = []
    if moe is None or moe.layers < text.layers:
        layers.append(("the MLP's", text.intermediate))
    if moe is not None:
        layers += [("the shared expert's", moe.shared_intermediate)]
        if moe.intermediate % packed.group_size:
            yield f"an expert's {moe.intermediate} channels are no groups of {packed.group_size}"
    if text.mla is None:
        layers.append(("the queries'", text.heads * text.head_dim))
        layers.append(("the keys'", kv_heads_held(text.kv_heads, tp) * text.head_dim))
    for what, channels in layers:
        if channels % (packed.group_size * tp):
            ranks = f" on each of {tp} ranks" if tp > 1 else ""
            yield f"{what} {channels} channels are no whole groups of {packed.group_size}{ranks}"


def settings_problem(settings: Settings) -> str | None:
    """Values that the engine refuses, or that the account does not know."""
    if not 0 < settings.cache_max_entry_count < 1:
        return "--cache-max-entry-count must lie between 0 and 1 on the PyTorch engine"
    if settings.quant_policy not in KV_TYPES:
        known = ", ".join(map(str, KV_TYPES))
        return f"--quant-policy {settings.quant_policy} is not planned for: {known} are"
    if 0 < settings.num_gpu_blocks <= RESERVED_BLOCKS:
        return f"--num-gpu-blocks {settings.num_gpu_blocks}: the engine keeps so many for itself"
    if settings.distributed_executor_backend == "uni" and settings.tp > 1:
        return f"--distributed-executor-backend uni runs one rank, not {settings.tp}: mp and ray do"
    tokens = settings.cache_block_seq_len
    if tokens < _LEAST_BLOCK or tokens & (tokens - 1):
        return (
            f"--cache-block-seq-len {tokens}: the PyTorch engine takes powers of two from"
            f" {_LEAST_BLOCK} on"
        )
    return None


def checkpoint_problem(model: Model, settings: Settings) -> str | None:
    """A format that the checkpoint has not.

    Source: pytorch/config.py: of a quantised checkpoint the option is ignored; 16-bit weights are
    quantised at load for fp8, and every other word stops the engine, hf too.
    """
    quantization, given = model.quantization, settings.model_format
    if given is None or (quantization and given == quantization.method):
        return None
    if quantization:
        return f"--model-format {given}: the weights of {model.name} are {quantization.method}"
    if given == "fp8":
        return "--model-format fp8: turbofit has no account of weights that are quantised at load"
    return (
        f"--model-format {given}: the weights of {model.name} are stored in {model.dtype}, and the"
        " PyTorch engine takes no such word for them"
    )


def cache_problem(model: Model, settings: Settings) -> str | None:
    """Heads that cannot be rotated. Source: pytorch/kernels/cuda/fill_kv_cache.py.

    Of latents keys and values are the same bytes, which it would quantise as the one and the other.
    """
    size = model.text.head_dim
    if settings.quant_policy and model.text.cached_latent:
        return f"--quant-policy {settings.quant_policy} is not planned for latent attention: 0 is"
    if model.text.expands_latent and KV_TYPES[settings.quant_policy].key_scales:
        # models/minicpm3.py hands no scales to its attention: the warm-up fails.
        return (
            f"--quant-policy {settings.quant_policy}: LMDeploy 0.18's class of {model.name} caches"
            " at 16 bits, or in fp8 (16, 17)"
        )
    if settings.quant_policy == TURBO_QUANT and size & (size - 1):
        return f"--quant-policy {TURBO_QUANT} takes heads of a power of two, not of {size}"
    return None


def draft_problem(settings: Settings) -> str | None:
    """Options that a step of several tokens does not support, or that a draft would get too.

    Source: backends/cuda/attention/fa3.py, engine/config_builder.py, pytorch/config.py.
    """
    if settings.draft is None:
        return None
    if settings.quant_policy:
        return (
            f"--quant-policy {settings.quant_policy} does not draft: FlashAttention-3 reads the"
            " cache as it is, and of 16 bits alone"
        )
    if settings.draft.text.mla and settings.cache_block_seq_len != _FLASH_MLA_BLOCK:
        return (
            f"--cache-block-seq-len {settings.cache_block_seq_len}: FlashMLA, with which drafts are"
            f" verified, takes blocks of {_FLASH_MLA_BLOCK}"
        )
    if settings.model_format and settings.draft.has_checkpoint:
        return (
            f"--model-format {settings.model_format} is taken for the draft's weights as well,"
            " which are of 16 bits"
        )
    return None


def state_problem(launch: EngineLaunch) -> str | None:
    """States of another type than what is copied into them: the first prefill fails.

    Of cards that have no bfloat16 `missing_kernels` tells.

    Source: configurations/qwen3_next.py, backends/cuda/causal_conv1d.py (``index_copy_``).
    """
    dtype = launch.settings.dtype
    if dtype == "bfloat16" or _without_bfloat16(launch) or not _bfloat_states(launch.model):
        return None
    return (
        f"LMDeploy 0.18 keeps the states of {launch.model.name} in bfloat16, so that it runs in no"
        f" other dtype: --dtype is {dtype}"
    )


def _bfloat_states(model: Model) -> bool:
    return model.text.architecture == _BFLOAT_STATES


def _without_bfloat16(launch: EngineLaunch) -> str | None:
    """The first of the cards that has no bfloat16, by its name."""
    return next((gpu.name for gpu in launch.gpus if capability_of(gpu) < AMPERE), None)


def communicator_problem(settings: Settings) -> str | None:
    """The engine always uses NCCL."""
    if settings.communicator != "nccl":
        return f"--communicator {settings.communicator} is TurboMind's: the PyTorch engine has NCCL"
    return None


def missing_kernels(launch: EngineLaunch) -> str | None:
    """What Triton does not compile for one of the cards, or the card does not compute.

    Source: triton.compile of Triton 3.7.1 for each architecture: ``fp8e4nv`` from sm_89 on
    (`python -m bench.census.triton`). LMDeploy's fp8 kernels load weights of that type, and store
    keys and values of it with ``quant_policy 16``; ``fp8e5``, with 17, is compiled for all.
    """
    quantization, draft = launch.model.quantization, launch.settings.draft
    if draft is not None and (without := without_kernels(draft, launch.gpus)):
        return without
    if _bfloat_states(launch.model) and (card := _without_bfloat16(launch)):
        return f"LMDeploy 0.18 keeps its states in bfloat16, which {card} does not have"
    if quantization is not None and quantization.method == "fp8":
        what, otherwise = "kernel", ""
    elif launch.settings.quant_policy == _FP8_CACHE:
        what, otherwise = "KV cache", "; --quant-policy 17 (fp8_e5m2) runs"
    else:
        return None
    for gpu in launch.gpus:
        if capability_of(gpu) < _FP8:
            return (
                f"Triton compiles no fp8 {what} for {gpu.name}: it takes compute capability"
                f" {_FP8[0]}.{_FP8[1]} or newer{otherwise}"
            )
    return None
