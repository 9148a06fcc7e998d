"""The memory of the PyTorch engine on one group of GPUs at any ratio, and the refused options.

The terms of a ledger have the order of the engine's allocations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from msgspec.structs import replace

from turbofit.core.machine import Gpu
from turbofit.core.messages import RESERVED, counted
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, GpuLedger, HostMemory, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import HALF, INT, MIB, round_up
from turbofit.core.version import REFERENCE
from turbofit.memory.account import (
    AMPERE,
    HOPPER,
    POOL_WARMUP,
    STATE_CACHE,
    Account,
    CacheShape,
    Engine,
    EngineLaunch,
    RankWeights,
    StaticMemory,
    VisionLoad,
    capability_of,
    first_terms,
    term,
    total_bytes,
    transients,
    uneven,
)
from turbofit.memory.calibrated import calibration_for, corrected
from turbofit.memory.pytorch.activations import Activations, Prefill, activations_of
from turbofit.memory.pytorch.adapters import (
    adapter_bytes,
    adapter_files,
    adapter_problem,
    kernel_problem,
)
from turbofit.memory.pytorch.cache import (
    KV_TYPES,
    LATENT_BLOCK,
    RESERVED_BLOCKS,
    TURBO_QUANT,
    UnitsMet,
    cache_shape,
    draft_block,
    engine_bound,
    runtime_bytes,
    state_bytes,
    state_slots,
    units_met,
)
from turbofit.memory.pytorch.weights import (
    VOCAB_ROWS,
    WHOLE_TOWERS,
    PytorchConstants,
    draft_staged,
    draft_weights,
    environment,
    is_copied,
    kv_heads_held,
    largest_loaded,
    load_constants,
    own_draft_weights,
    packed_copy,
    segments,
    share_of,
    staged_copy,
    unusable_between,
    weight_classes,
)

#: The first compute capability without kernels of FlashAttention-3.
_AFTER_HOPPER = (10, 0)
#: The multiprocessors (SMs) of a card if their number is unknown.
_MOST_PROCESSORS = 132
#: The least bytes of a block in a segment of 20 MiB (kMinLargeAlloc of torch's allocator).
_LARGE_BLOCK = MIB
#: The first compute capability for which Triton compiles fp8.
_FP8 = (8, 9)
#: The `quant_policy` of an fp8 cache.
_FP8_CACHE = 16
#: Models with KV heads that LMDeploy does not repeat. Source:
#: lmdeploy configurations/llava_hf.py::LlavaHfModelConfigBuilder.build #9969cb
_NO_REPEAT = frozenset(
    {
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "Llama4ForConditionalGeneration",
    }
)
#: The kind of tower with heads that need not divide by the ranks: some ranks then have more heads.
#: Source: lmdeploy pytorch/models/internvl.py::InternAttention.__init__ #0fca87
_UNEQUAL_HEADS = "internvit"
#: The model that keeps states in bfloat16 with every dtype.
_BFLOAT_STATES = "Qwen3NextForCausalLM"
#: Quantisation methods with groups of elements (one scale each) that ranks cannot divide.
_CUT_METHODS = frozenset({"awq", "fp8"})
#: The fewest tokens of a block that the kernels take.
_LEAST_BLOCK = 16  # lmdeploy lmdeploy/messages.py::PytorchEngineConfig `kernel_block_size >= 16`


def before_terms(launch: EngineLaunch, gpu: Gpu, constants: PytorchConstants) -> list[Term]:
    """Return the memory on one GPU before the weights: others, contexts, communicator.

    On pretend GPUs, LMDeploy's front end makes no
    CUDA context; the terms therefore have no context for the front end. If the front end makes a
    context on a real card, the cache shrinks by the ratio's share of the context, and the account
    is too low by the rest.
    """
    terms, tp = first_terms(gpu), launch.settings.tp
    if tp > 1:
        size = constants.nccl_buffers[launch.nccl_link(gpu)]
        terms.append(term("communicator", "context", size, "estimate", f"NCCL, {tp} ranks"))
    return terms


def weight_terms(
    model: Model,
    settings: Settings,
    classes: Mapping[str, int],
    capability: tuple[int, int],
    constants: PytorchConstants,
) -> list[Term]:
    """Return the terms of one rank's weights by class, and of unusable memory between weights."""
    basis = model.source.sizes
    terms = [term(f"weights.{name}", "weights", size, basis) for name, size in classes.items()]
    copied = packed_copy(model, settings.tp, capability, constants)
    if copied:
        note = "AWQ's weights again, for TurboMind's kernels, which the engine uses on Hopper"
        terms.append(term("weights.packed_copy", "weights", copied, "estimate", note))
    if model.loras:
        held, note = adapter_bytes(model, settings.tp), f"{len(model.loras)} LoRA, of all modules"
        terms.append(term("weights.adapters", "weights", held, "formula", note))
    kind = segments(settings)
    fragmented = constants.segment
    if kind == "fixed":
        fragmented += unusable_between(model, settings.tp)
    if model.text.moe is not None or model.draft:
        # Unusable memory: 33 MiB after experts are copied to a new layout (on pretend GPUs), 9 MiB
        # after tensors of a draft are freed.
        fragmented += constants.segment
    if model.draft and model.draft.is_own and model.draft.text.moe is not None:
        # A draft's experts are copied, too: 76 MiB were seen in all.
        fragmented += 2 * constants.segment
    note = f"torch's {kind} segments, filled in part"
    terms.append(term("load_fragmentation", "weights", fragmented, "estimate", note))
    return terms


def capture_sizes(settings: Settings) -> list[int]:
    """Return the batch sizes for which the engine captures a CUDA graph.

    Source: lmdeploy graph_runner/runner.py::_get_capture_batch_size_impl #ce8be7
    """
    if settings.eager_mode:
        return []
    most = settings.max_batch_size
    if settings.cudagraph_capture_batch_sizes:
        return sorted({n for n in settings.cudagraph_capture_batch_sizes if n < most} | {most})
    sizes, size = [], 1
    while size <= min(256, most):
        sizes.append(size)
        size *= 2
    sizes += range(size, most + 1, 256)
    return sizes if sizes[-1] == most else [*sizes, most]


def buffer_terms(
    model: Model,
    work: Activations,
    settings: Settings,
    gpu: Gpu,
    most_blocks: int,
    constants: PytorchConstants,
) -> list[Term]:
    """Return one GPU's permanent memory after the cache.

    CUDA graphs have tables of ``most_blocks`` blocks. A term that is not in torch's allocator is
    also named in `weights.OUTSIDE_TORCH`.
    """
    hopper = capability_of(gpu) >= HOPPER
    workspace = constants.cublas_workspace["hopper" if hopper else "default"]
    size = constants.cublas_workspaces * workspace
    terms = [term("cublas", "buffers", size, "formula", "workspaces of torch's handles")]
    if is_copied(model, capability_of(gpu)):
        size = int(constants.packed_copy["kernels"])
        note = "TurboMind's kernels and their workspaces"
        terms.append(term("packed_kernels", "buffers", size, "estimate", note))
    if captured := capture_sizes(settings):
        tables = sum(captured) * most_blocks * INT + work.graph_buffers(captured)
        # Torch keeps the graphs' memory separate: no prefill can use the graphs' pool.
        note = "each CUDA graph's table of blocks, and the graphs' own pool"
        size = tables + _step_pool(work, settings, constants)
        terms.append(term("cuda_graphs", "buffers", size, "formula", note))
    note = "kernels loaded lazily"
    terms.append(term("kernel_modules", "buffers", constants.kernel_modules, "estimate", note))
    return terms


def pool_term(work: Activations, settings: Settings, constants: PytorchConstants) -> Term:
    """Return the term of the bytes that torch keeps after the warm-up.

    The warm-up is a prefill with one token for each row of the batch.
    """
    size, note = _step_pool(work, settings, constants), "an eager pass"
    if work.decode(settings.max_batch_size) >= _LARGE_BLOCK:
        # A segment for blocks of this size. Over: the size contains the MLP's block, too. Choosing
        # the experts' kernels leaves one more segment; seen on pretend GPUs: 143 of 152 MiB.
        size += constants.segment * (2 if work.text.moe else 1)
    size += round_up(work.delta_warmup(settings.max_batch_size), constants.page)
    size += work.further_pool()
    size += round_up(work.restored(settings.max_batch_size), constants.page)
    # A first CUDA graph frees what choosing kernels took, unless a block stands in a fixed segment.
    fixed = segments(settings) == "fixed"
    if (work.model.loras and (fixed or settings.eager_mode)) or (work.text.moe and fixed):
        size += constants.kernel_tuning
    return term(POOL_WARMUP, "buffers", size, "formula", note)


def _step_pool(work: Activations, settings: Settings, constants: PytorchConstants) -> int:
    step = work.decode(settings.max_batch_size)
    return max(constants.segment, round_up(step, constants.page) + constants.page)


def transient_terms(
    model: Model,
    work: Activations,
    settings: Settings,
    vision_load: VisionLoad,
    met: UnitsMet,
    constants: PytorchConstants,
) -> tuple[Term, ...]:
    """Return the most bytes in torch's allocator beyond permanent terms, in each worst case.

    The bytes include unusable memory between live blocks: a share of the bytes, but at least one
    `segment`.
    """
    sequences = settings.max_batch_size
    # Whole prompts join a forward; the forward may therefore have more tokens than a session. The
    # last chunk of a long prompt, which sees the whole context, may be in the same forward.
    most = sequences * settings.session_len
    prompt = min(settings.max_prefill_token_num, most)
    context = min(settings.session_len + prompt, most)
    rule = model.image_rule
    tables = work.tables() if rule is not None and vision_load.units_per_image else 0
    text = work.prefill(Prefill(tokens=prompt, context=context, sequences=sequences))
    chunks = -(-settings.session_len // prompt)
    kept = 0
    if model.draft and model.draft.is_own:
        forward = Prefill(tokens=prompt, context=context, sequences=sequences)
        text = max(text, work.own_prefill(model.draft, forward, chunks))
        # The model's states, and with images its embeddings, wait for the draft.
        kept = prompt * (2 if rule is not None else 1) * model.text.hidden * HALF
    elif model.draft:
        forward = Prefill(tokens=prompt, context=context)
        size = work.draft_prefill(model.draft, forward, chunks) + constants.prefill_base
        text = max(text, size)
    cases: list[tuple[str, int, str]] = [
        ("text_prefill", text + tables, "longest prompts fill a forward"),
        (
            "sampling",
            work.sampling(sequences, kept) + tables,
            f"{counted(sequences, 'row')} with top_k=0",
        ),
    ]
    if rule is not None and vision_load.units_per_image:
        # A chunk never cuts an image, and is therefore at least as long as the longest image.
        image = vision_load.tokens_per_request // max(1, vision_load.images_per_request)
        forward = Prefill(
            tokens=max(prompt, image),
            context=context,
            units=met.now,
            sequences=sequences,
            next_units=met.next,
        )
        note = f"{counted(met.now, rule.unit_name)} in one forward"
        if met.next:
            note += f", the pixels of {met.next} for the next"
        size = work.prefill(forward)
        if model.draft:  # only drafts of the model's own layers have a base with images
            size = max(size, work.own_prefill(model.draft, forward, chunks))
        cases.append(("vision_forward", size, note))
    if model.loras:
        size = work.decode(sequences) + work.restored(sequences) + constants.kernel_tuning
        cases.append(("adapter_kernels", size, "kernels of adapters are chosen in the warm-up"))
    share = constants.live_fragmentation[segments(settings)]

    def reserved(size: int) -> int:
        return round_up(size + max(int(size * share), constants.segment), constants.page)

    return transients([(name, reserved(size), "estimate", note) for name, size, note in cases])


def _problems(model: Model, tp: int) -> Iterator[str]:
    """Yield the reasons why a tensor-parallel degree is impossible.

    Source: lmdeploy configurations/builder.py::AutoModelConfigBuilder.update_num_kv_heads #b9ff5a
    """
    text = model.text
    if text.expands_latent and tp > 1:
        # Each rank has the whole kv_b, but expects the outputs of the rank's heads only:
        # lmdeploy pytorch/models/minicpm3.py::MiniCPMAttention.__init__ #f7a181
        yield (
            f"LMDeploy {REFERENCE}'s class of {model.name} fails at its first forward on"
            " several ranks"
        )
    yield from uneven(_divided(model), tp)
    if text.kv_heads % tp and (tp % text.kv_heads or model.architecture in _NO_REPEAT):
        yield f"{text.kv_heads} KV heads cannot be dealt to {tp} ranks"
    yield from _cut_groups(model, tp)
    if problem := adapter_problem(model, tp):
        yield problem


def _divided(model: Model) -> Iterator[tuple[int, str]]:
    """Yield the numbers that ranks divide in equal shares, each with a name."""
    text, vision = model.text, model.vision
    yield text.heads, f"{text.heads} attention heads"
    yield text.intermediate, f"the MLP's {text.intermediate} channels"
    if text.moe is not None:
        shared, expert = text.moe.shared_intermediate, text.moe.intermediate
        yield shared, f"the shared expert's {shared} channels"
        yield expert, f"the experts' {expert} channels"
    if text.cached_latent is not None or (model.draft and model.draft.is_own):
        yield round_up(text.vocab, VOCAB_ROWS), f"the vocabulary's {text.vocab} rows"
    if text.delta is not None:
        yield text.delta.key_heads, f"the delta nets' {text.delta.key_heads} key heads"
    if vision is None or vision.kind in WHOLE_TOWERS:
        return
    if vision.kind != _UNEQUAL_HEADS:
        yield vision.heads, f"the vision tower's {vision.heads} heads"
    yield vision.intermediate, f"the vision tower's {vision.intermediate} channels"


def _cut_groups(model: Model, tp: int) -> Iterator[str]:
    """Yield the layers that fail to load because ranks would cut a group of quantised weights.

    Experts in fp8 are divided in whole groups, also unequally. Source:
    lmdeploy linear/awq.py::AwqLinear._get_io_features #f23fcc
    lmdeploy linear/blocked_fp8.py::BlockedF8Linear._get_io_features #72d3c8
    """
    text, moe, packed = model.text, model.text.moe, model.quantization
    channels = moe.intermediate // tp if moe is not None else 0
    if packed is not None and packed.of_experts and channels % packed.group_size:
        yield f"{channels} channels of an expert on each rank are no groups of {packed.group_size}"
    if packed is None or packed.method not in _CUT_METHODS:
        return
    layers = []
    if moe is None or moe.layers < text.layers:
        layers.append(("the MLP's", text.intermediate))
    if moe is not None:
        layers.append(("the shared expert's", moe.shared_intermediate))
        if moe.intermediate % packed.group_size:
            yield f"an expert's {moe.intermediate} channels are no groups of {packed.group_size}"
    if text.mla is None:
        layers.append(("the queries'", text.heads * text.head_dim))
        layers.append(("the keys'", kv_heads_held(text.kv_heads, tp) * text.head_dim))
    for what, channels in layers:
        if channels % (packed.group_size * tp):
            ranks = f" on each of {tp} ranks" if tp > 1 else ""
            yield f"{what} {channels} channels are no whole groups of {packed.group_size}{ranks}"


def _refused(launch: EngineLaunch) -> Iterator[str]:
    """Yield the options that the engine refuses or dies of, or that have no account."""
    model, settings = launch.model, launch.settings
    if not 0 < settings.cache_max_entry_count < 1:
        yield "`--cache-max-entry-count` must lie between 0 and 1 on the PyTorch engine"
    if settings.quant_policy not in KV_TYPES:
        known = ", ".join(map(str, KV_TYPES))
        yield f"`--quant-policy {settings.quant_policy}`: turbofit has accounts of {known}"
        return
    yield from _refused_numbers(settings)
    yield from _refused_format(model, settings.model_format)
    yield from _refused_cache_type(model, settings.quant_policy)
    # The first prefill fails if the states' dtype differs from the dtype of the copied values.
    # `missing_kernels` handles cards without bfloat16. Source: CausalConv1d's ``index_copy_``, and
    # lmdeploy configurations/qwen3_next.py::Qwen3NextModelConfigBuilder.build #c319c1
    bfloat_states = model.text.architecture == _BFLOAT_STATES and not _card_before(launch, AMPERE)
    if bfloat_states and settings.dtype != "bfloat16":
        yield (
            f"LMDeploy {REFERENCE} keeps the states of {model.name} in bfloat16, and runs it in no"
            f" other dtype: `--dtype` is {settings.dtype}"
        )
    tokens = settings.cache_block_seq_len
    if model.draft and model.text.cached_latent is not None and tokens != LATENT_BLOCK:
        yield f"`--cache-block-seq-len {tokens}`: FlashMLA, for a draft, takes {LATENT_BLOCK} alone"
    if model.draft and settings.quant_policy:
        yield (
            f"`--quant-policy {settings.quant_policy}`: FlashAttention-3 reads the caches of draft"
            " and base only at 16 bits"
        )
    if settings.communicator != "nccl":
        name = settings.communicator
        yield f"`--communicator {name}` is TurboMind's: the PyTorch engine has NCCL"


def _refused_numbers(settings: Settings) -> Iterator[str]:
    """Yield sizes and ranks that the engine refuses for every model."""
    if 0 < settings.num_gpu_blocks <= RESERVED_BLOCKS:
        blocks = settings.num_gpu_blocks
        yield f"`--num-gpu-blocks {blocks}`: the engine needs all these blocks itself"
    if settings.distributed_executor_backend == "uni" and settings.tp > 1:
        yield f"`--distributed-executor-backend uni` runs one rank, not {settings.tp} as mp does"
    tokens = settings.cache_block_seq_len
    if tokens < _LEAST_BLOCK or tokens & (tokens - 1):
        yield (
            f"`--cache-block-seq-len {tokens}`: the PyTorch engine takes powers of two from"
            f" {_LEAST_BLOCK} on"
        )


def _refused_format(model: Model, given: str | None) -> Iterator[str]:
    """Yield a problem if ``--model-format`` is not the stored format of the weights.

    The engine ignores the option for a quantised checkpoint. With 16-bit weights, the word fp8
    makes the engine quantise weights at load; every other word, also hf, stops the engine. Source:
    lmdeploy pytorch/config.py::_patch_quantization_config #438ef9
    """
    stored = model.quantization and model.quantization.method
    if given is None or given == stored:
        return
    why = f"the weights of {model.name} are stored in {stored or model.dtype}, as the config says"
    if given == "fp8" and not stored:
        why = "turbofit has no account of weights that are quantised at load"
    yield f"`--model-format {given}`: {why}"


def _refused_cache_type(model: Model, policy: int) -> Iterator[str]:
    """Yield the reasons why the model's cache cannot have the type of a ``quant_policy``."""
    text = model.text
    # Keys and values of latents are the same bytes: the engine would quantise the bytes twice.
    # lmdeploy cuda/fill_kv_cache.py::fill_kv_cache #e8382c
    if policy and text.cached_latent:
        yield f"`--quant-policy {policy}`: turbofit plans latent attention only with 0"
    if text.expands_latent and KV_TYPES[policy].key_scales:
        # The model's attention gets no scales, and the warm-up fails:
        # lmdeploy pytorch/models/minicpm3.py::MiniCPMAttention.forward #130d73
        yield (
            f"`--quant-policy {policy}`: LMDeploy {REFERENCE}'s class of {model.name} caches at"
            " 16 bits, or in fp8 (16, 17)"
        )
    if policy == TURBO_QUANT and text.head_dim & (text.head_dim - 1):
        yield (
            f"`--quant-policy {TURBO_QUANT}` takes heads of a power of two, not of {text.head_dim}"
        )


def _card_before(launch: EngineLaunch, capability: tuple[int, int]) -> str | None:
    """Return the name of the first card with a lower compute capability, or None."""
    return next((gpu.name for gpu in launch.gpus if capability_of(gpu) < capability), None)


def _draft_problem(model: Model, gpu: Gpu) -> str | None:
    """Return a sentence if a card cannot decode a draft's tokens, or None."""
    kernels, generations, oldest = "FlashAttention-3", "8 and 9", AMPERE
    if model.text.cached_latent is not None:
        kernels, generations, oldest = "FlashMLA", "9", HOPPER
    if oldest <= capability_of(gpu) < _AFTER_HOPPER:
        return None
    return (
        f"LMDeploy decodes a draft's tokens by {kernels}, which has kernels for compute capability"
        f" {generations}, and none for {gpu.name}"
    )


def _drafted_ranks(model: Model, ranks: int) -> range:
    """Return the ranks that have a draft: none, the first, or all if it is the model's layers."""
    if not model.draft:
        return range(0)
    return range(ranks if model.draft.is_own else 1)


class PytorchAccount(Account):
    """The account of one model with given settings on one group of GPUs."""

    cache_shortfall: str = (
        "that LMDeploy asks for ({more} more): with fewer blocks LMDeploy halves"
        " max_prefill_token_num, or stops with 'No enough gpu memory for kv cache.'"
    )
    dies: ClassVar[str] = "serves no more (every request gets 503 while /health stays 200)"
    allocator: ClassVar[str] = "torch's allocator"
    #: The formulas; the class of a newer version may replace each formula (docs/adding.md).
    activations_of = staticmethod(activations_of)
    cache_shape = staticmethod(cache_shape)
    units_bound = staticmethod(engine_bound)
    weight_classes = staticmethod(weight_classes)
    state_bytes = staticmethod(state_bytes)
    runtime_bytes = staticmethod(runtime_bytes)
    before_terms = staticmethod(before_terms)
    weight_terms = staticmethod(weight_terms)
    buffer_terms = staticmethod(buffer_terms)
    pool_term = staticmethod(pool_term)
    transient_terms = staticmethod(transient_terms)

    def __init__(self, launch: EngineLaunch, constants: PytorchConstants) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        vision_load = launch.vision_load
        self.constants = constants
        #: Bytes of a draft's keys and values in one block; 0 without a draft.
        self._drafts = draft_block(model, settings)
        shape = self.cache_shape(model.text, settings, constants)
        # A draft's cache has as many blocks as the model's cache.
        self.shape = replace(shape, block_bytes=shape.block_bytes + self._drafts)
        #: The GPUs of the group that have a draft: all of them, or the first.
        self._drafted = _drafted_ranks(model, len(gpus))
        # With fewer blocks the engine lowers max_prefill_token_num, or stops.
        self.least_blocks = constants.least_blocks
        tokens = model.draft.tokens if model.draft else 0
        state = self.state_bytes(model.text, settings, tokens)
        #: Bytes of the delta nets' states, which are allocated, and of the runtime's reserve, which
        #: is not.
        self._kept = state + self.runtime_bytes(model.text, settings)
        work = self.activations_of(model, settings, constants)
        work.processors = max(known(gpu.sm_count, _MOST_PROCESSORS) for gpu in gpus)
        met = UnitsMet(0, 0)
        if model.image_rule is not None and vision_load.units_per_image:
            bound = self.units_bound(model.image_rule, vision_load, settings)
            met = units_met(bound, model.image_rule, vision_load, settings)
        transients = self.transient_terms(model, work, settings, vision_load, met, constants)
        before, staged = self._loaded(launch)
        # The states of delta nets are a single allocation, independent of the ratio.
        note = (
            f"{state_slots(settings)} slots: one for each sequence of max_batch_size, and two more"
        )
        note += f", each with the states after {tokens} proposed tokens" if tokens else ""
        if settings.prefix_cache_state_budget:
            note += f", and {settings.prefix_cache_state_budget} for prefixes"
        size = round_up(state, constants.page)
        states = (term(STATE_CACHE, "cache", size, "formula", note),) if state else ()
        calibration = calibration_for(launch, "pytorch", constants.version)
        static = []
        built = self._buffers(launch, work)
        for i, (terms, (most, buffers)) in enumerate(zip(before, built, strict=True)):
            if model.draft and i in self._drafted:
                graphs = work.own_graphs if model.draft.is_own else work.draft_graphs
                size = graphs(model.draft, capture_sizes(settings), most)
                note = "the draft's CUDA graphs, and their own pool"
                buffers.append(term("draft_graphs", "buffers", size, "formula", note))
            memory = StaticMemory(before=terms, buffers=(*states, *buffers), staged=staged)
            static.append(corrected(memory, calibration))
        pool = self.pool_term(work, settings, constants)
        super().__init__(launch, static, pool, transients, met.now, calibration)
        blocks = [shape.block_bytes + self._drafts * (i in self._drafted) for i in range(len(gpus))]
        #: For each GPU, the bytes that ratio 1 would give to the cache, and the bytes of a block.
        self._shares = [
            (gpu.usable - total_bytes(memory.before) - self._kept, block)
            for gpu, memory, block in zip(gpus, self._static_memory, blocks, strict=True)
        ]

    def _buffers(self, launch: EngineLaunch, work: Activations) -> Iterator[tuple[int, list[Term]]]:
        """Yield for each GPU the most blocks that it may have, and the buffers beside them.

        Equal cards have equal buffers, computed once.
        """
        model, settings, made = launch.model, launch.settings, dict[object, list[Term]]()
        for gpu in launch.gpus:
            # As many blocks as an empty card could hold: over, but tables of blocks are small.
            most = settings.num_gpu_blocks or known(gpu.total, 0) // self.block_bytes
            kind = most, gpu.compute_capability
            if kind not in made:
                made[kind] = self.buffer_terms(model, work, settings, gpu, most, self.constants)
            yield most, [*made[kind]]

    def _loaded(self, launch: EngineLaunch) -> tuple[list[tuple[Term, ...]], int]:
        """Return each GPU's terms before the cache, and the additional bytes of loading."""
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        capability = capability_of(gpus[0])
        classes = self.weight_classes(model, settings.tp)
        weights = self.weight_terms(model, settings, classes, capability, self.constants)
        before = [(*self.before_terms(launch, gpu, self.constants), *weights) for gpu in gpus]
        largest = max(
            largest_loaded(model, settings.tp),
            staged_copy(model, settings.tp, capability, self.constants),
        )
        if draft := model.draft:
            if draft.is_own:
                size = own_draft_weights(model, draft, settings.tp)
                note = "the draft, divided as the model"
            else:
                size, note = draft_weights(draft), "the draft, whole on the first rank"
                largest = max(largest, draft_staged(draft))
            weight = term("weights.draft", "weights", size, "formula", note)
            for rank in self._drafted:
                before[rank] = (*before[rank], weight)
        largest += adapter_files(model)  # torch still holds the memory of earlier tensors
        return before, round_up(largest, self.constants.page)

    def best_ratio(self) -> float | None:
        """Return the best ratio; None if no cache fits.

        With a given number of blocks, every ratio gives an equal cache: one check is enough.
        """
        if self.settings.num_gpu_blocks and not self.fits_at(1.0):
            return None
        return super().best_ratio()

    @property
    def ratio_base(self) -> int:
        """The free bytes minus the states of delta nets and the runtime's reserve."""
        return self.free - self._kept

    def blocks_at(self, ratio: float) -> int:
        """Return the blocks by the ratio, which the engine checks even with ``num_gpu_blocks``."""
        return max(0, min(int(size * ratio) // block for size, block in self._shares))

    def cache_shortfall_at(self, ratio: float) -> int:
        """Return the bytes missing for the reserve and the least number of blocks, or 0."""
        if self.blocks_at(ratio) >= self.least_blocks:
            return 0
        return self.least_blocks * self.block_bytes - int(self.ratio_base * ratio)

    def region_at(self, ratio: float) -> int:
        return (self.settings.num_gpu_blocks or self.blocks_at(ratio)) * self.block_bytes

    def cache_terms(self, i: int, ratio: float) -> list[Term]:
        """Return the cache as a term, and the cache of a draft; each is one allocation."""
        note = f"{ratio:.3f} of free memory less the runtime's reserve"
        if self.settings.num_gpu_blocks:
            note = f"num_gpu_blocks {self.settings.num_gpu_blocks}"
        of_model, of_draft = self._cache_sizes(ratio)
        terms = [term("kv_cache", "cache", of_model, "formula", note)]
        if i in self._drafted:
            terms.append(term("kv_cache.draft", "cache", of_draft, "formula", "as many blocks"))
        return terms

    def _cache_sizes(self, ratio: float) -> tuple[int, int]:
        """Return the bytes of the model's cache, and of a draft's."""
        blocks = self.region_at(ratio) // self.block_bytes
        of_model = self.shape.held(blocks * (self.block_bytes - self._drafts))
        return of_model, self.shape.held(blocks * self._drafts)

    def _cache_bytes(self, i: int, ratio: float) -> int:
        """Return the driver's bytes for the cache, without making terms, for speed."""
        of_model, of_draft = self._cache_sizes(ratio)
        return of_model + of_draft * (i in self._drafted)


class Pytorch(Engine):
    """LMDeploy's engine in Python, on torch and Triton."""

    name: ClassVar[EngineName] = "pytorch"
    account_class: ClassVar[type[PytorchAccount]] = PytorchAccount

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.constants = load_constants(version)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        return next(_problems(model, tp), None)

    def problem(self, launch: EngineLaunch) -> str | None:
        return next(_refused(launch), None)

    def missing_kernels(self, launch: EngineLaunch) -> str | None:
        """Return a sentence if a card of the launch cannot run the kernels that it needs, or None.

        LMDeploy's fp8 weights, and keys and values with ``quant_policy 16``, have the type
        ``fp8e4nv``, which Triton compiles from sm_89 on. The type ``fp8e5`` (``quant_policy 17``)
        is compiled for all cards. Source: triton.compile of Triton 3.7.1 for each architecture
        (bench/census/TRITON.md).
        """
        for gpu in launch.gpus:
            if problem := kernel_problem(launch.model, capability_of(gpu), gpu.name):
                return problem
            if launch.model.draft and (problem := _draft_problem(launch.model, gpu)):
                return problem
        quantization = launch.model.quantization
        bfloat_states = launch.model.text.architecture == _BFLOAT_STATES
        if bfloat_states and (card := _card_before(launch, AMPERE)):
            return f"LMDeploy {REFERENCE} keeps its states in bfloat16, which {card} does not have"
        weights = quantization is not None and quantization.method == "fp8"
        older = _card_before(launch, _FP8)
        if older is None or not (weights or launch.settings.quant_policy == _FP8_CACHE):
            return None
        what = "kernel" if weights else "KV cache"
        otherwise = "" if weights else "; `--quant-policy 17` (fp8_e5m2) runs"
        return (
            f"Triton compiles no fp8 {what} for {older}: it takes compute capability"
            f" {_FP8[0]}.{_FP8[1]} or newer{otherwise}"
        )

    def environment(
        self, model: Model, settings: Settings, ledgers: Sequence[GpuLedger] = ()
    ) -> dict[str, str]:
        return environment(settings, model, share_of(ledgers) if ledgers else None)

    def cache(self, model: Model, settings: Settings) -> CacheShape:
        shape = super().cache(model, settings)
        return replace(shape, block_bytes=shape.block_bytes + draft_block(model, settings))

    def weights(self, model: Model, tp: int) -> RankWeights:
        classes = dict(self.account_class.weight_classes(model, tp))
        total = sum(classes.values())
        for unread in ("audio", "forgotten"):
            classes.pop(unread, 0)
        vision = classes.pop("vision", 0) + classes.pop("vision.whole", 0)
        embedding = classes.pop("embedding")
        # A tied embedding is read as the head.
        head = 0 if "lm_head" in classes else embedding
        return RankWeights(total=total, decode=sum(classes.values()) + head, vision=vision)

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Return the host memory of the front end, the engine and the workers.

        Each of several ranks has a worker process. Pixels have 32 bits during preprocessing, and
        16 bits in each process on the way to the ranks.
        """
        pixels = model.pixel_bytes(units_per_forward)
        backend = settings.distributed_executor_backend or ("uni" if settings.tp == 1 else "ray")
        ranks = 0 if backend == "uni" else settings.tp
        pageable = (2 + ranks) * self.constants.host_process + pixels * (4 + ranks)
        return HostMemory(pinned=0, pageable=pageable, available=None)

    def warnings(self, settings: Settings) -> tuple[str, ...]:
        if settings.tp == 1 or settings.distributed_executor_backend not in (None, "ray"):
            return (RESERVED,)
        return (
            RESERVED,
            "the ranks run on Ray, which keeps objects in /dev/shm (up to 30 % of host RAM), and"
            " waits half an hour without a message if GPUs are taken",
        )
