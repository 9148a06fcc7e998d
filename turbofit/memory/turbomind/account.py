"""The memory of TurboMind on one group of GPUs at any cache ratio, and the refused options.

The terms of a ledger have the order of TurboMind's allocations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import ClassVar, Final

from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.messages import counted, plural
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, GpuLedger, HostMemory, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import format_bytes, round_up
from turbofit.machine.kernels import families
from turbofit.machine.kernels.census import Census, released
from turbofit.memory import versions
from turbofit.memory.account import (
    AMPERE,
    HOPPER,
    PAGE,
    POOL_WARMUP,
    TEMPORARIES,
    Account,
    CacheShape,
    Engine,
    EngineLaunch,
    Forward,
    LoggedSlab,
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
from turbofit.memory.turbomind.cache import SlabShape, StatePart, cache_shape, shape_of
from turbofit.memory.turbomind.pool import (
    PoolModel,
    device_buffers,
    engine_bound,
    forward_tokens,
    meeting_workspace,
    phases_of,
    pinned_buffers,
    symmetric_buffer,
    workspace,
)
from turbofit.memory.turbomind.weights import (
    EngineConstants,
    kv_heads_held,
    load_constants,
    loading_extra,
    staging_bytes,
    temporary_bytes,
    vision_mlp_width,
    weight_classes,
)

#: What `capability_of` takes for an unknown card: no layer then fuses gate and up, which is over.
FUSES_NOTHING: Final = (8, 0)
#: Buffers outside all pools: the communicator's, and one from cudaMalloc.
_APART = ("symmetric_buffer", "l2_flush")
#: The SMs of a card if unknown. Over: more than any card has.
_MOST_SMS = 256
_STEPS = "pools grow by 32 MiB"
#: Bytes of an L2 that neither NVML nor a preset knows. Over: the largest L2 of any card.
_LARGEST_L2 = 132 << 20
_IPC_RANKS = 8
#: A KV block's tokens must be a multiple of 32, or of 64 on cards before Ampere. LMDeploy's
#: `--help` gives this rule, but nothing checks the rule; with 16 tokens, answers are garbled
#: (lmdeploy#1195).
_BLOCK = 32
_BLOCK_BEFORE_AMPERE = 64
_INT4: Final = frozenset({"awq", "gptq", "compressed-tensors"})
_KV: Final = {4: "int4", 8: "int8"}
#: The assumed capabilities of a card without a known one; a library must have code for each.
_ASSUMED: Final = ((8, 0), (8, 6), (8, 9), (9, 0))


def before_terms(launch: EngineLaunch, gpu: Gpu, constants: EngineConstants) -> list[Term]:
    """Return the memory on one GPU before the weights: others, context, kernels, communicator."""
    settings, handles = launch.settings, constants.cublas_handles
    handle = "hopper" if capability_of(gpu) >= HOPPER else "default"
    workspaces = handles * constants.cublas_handle[handle]
    note = "torch's and the weight loader's"
    terms = [
        *first_terms(gpu),
        term("cublas", "context", workspaces, "estimate", f"{handles} handles' workspaces"),
        term("torch_kernels", "context", constants.torch_kernels, "estimate", note),
    ]
    if settings.tp > 1:
        note = f"{settings.communicator}, {settings.tp} ranks"
        # NCCL's buffers were measured for each class of link; LMDeploy's source gives cuda-ipc's.
        size = constants.nccl_buffers[launch.nccl_link(gpu)]
        links = term("communicator", "context", size, "estimate", note)
        if settings.communicator != "nccl":
            size = constants.ipc_packet + constants.ipc_scratch + PAGE
            links = term("communicator", "context", size, "formula", note)
        terms.append(links)
    if constants.gemm_in_context:
        # On a real card the GEMM workspace is in the weights' pool. Whole steps are too much if the
        # last step of the weights has room for the workspace.
        size = round_up(sum(constants.gemm_in_context), constants.pool_granularity)
        note = "barriers, partials, tensor maps"
        terms.append(term("gemm_workspace", "context", size, "formula", note))
    return terms


def weight_terms(
    model: Model, classes: Mapping[str, int], temporaries: int, constants: EngineConstants
) -> list[Term]:
    """Return one rank's weights by class as terms, and temporary memory that is not free yet."""
    basis = model.source.sizes
    terms = [term(f"weights.{name}", "weights", size, basis) for name, size in classes.items()]
    total = sum(classes.values())
    rounded = round_up(total, constants.pool_granularity)
    terms.append(term("weights.rounding", "weights", rounded - total, "formula", _STEPS))
    # Temporaries share the weights' pool, so that only further steps of the pool count. A step too
    # many would make the planned cache smaller than the real cache.
    waiting = round_up(total + temporaries, constants.pool_granularity) - rounded
    if waiting:
        note = "freed, but not returned yet when free memory is read"
        terms.append(term(TEMPORARIES, "weights", waiting, "formula", note))
    return terms


def rank_weights(classes: Mapping[str, int]) -> RankWeights:
    """Return the rank's bytes: of all weights, of a decode step's weights, and of the tower's."""
    total = sum(classes.values())
    vision = classes.get("vision", 0) + classes.get("projector", 0)
    return RankWeights(total=total, decode=total - vision - classes["embedding"], vision=vision)


def cache_terms(region: int, ratio: float, temporaries: int, state: int = 0) -> list[Term]:
    """Return the terms of the cache, and of ``temporaries`` that the driver frees after the cache.

    A driver keeps freed memory until the next synchronisation. The engine does not synchronise
    before the size of the cache is set (seen on an H200: bench/gpu/results/h200, a-pool). In a
    hybrid model, each running sequence takes ``state`` bytes of the cache.
    """
    note = f"{ratio:.3f} of free memory"
    if state:
        note += f"; each running sequence's state takes {format_bytes(state)} of the cache"
    terms = [term("kv_cache", "cache", region, "formula", note)]
    if temporaries:
        note = "returned at the next synchronisation"
        terms.append(term(f"{TEMPORARIES}.returned", "cache", -temporaries, "formula", note))
    return terms


def buffer_terms(
    model: Model, settings: Settings, gpu: Gpu, constants: EngineConstants, weights: int
) -> list[Term]:
    """Return one GPU's permanent memory after the cache, without the executor's pool.

    ``weights`` are the bytes of the rank's weights. The weights' pool, which grows in steps, also
    has the GEMM workspace. The workspace fills the rest of the weights' last step, then takes new
    steps. The workspace of delta nets has a pool of its own.
    """
    step = constants.pool_granularity
    lines = list(device_buffers(model, settings, constants, known(gpu.l2, _LARGEST_L2)))
    workspace, meeting = _delta_workspaces(model, settings, gpu, constants)
    if workspace:
        lines.append(("delta_workspace", workspace, "gated delta nets, for the warm-up's prompt"))
    terms = [term(name, "buffers", size, "formula", note) for name, size, note in lines]
    # The memory of buffers that do not share the pool of all others.
    apart = {name: round_up(size, PAGE) for name, size, _ in lines if name in _APART}
    gemm = sum(constants.gemm_workspace)
    steps = round_up(weights + gemm, step) - round_up(weights, step)
    # Too high by one or two pages if the weights' last step contains a part of the workspace.
    apart["gemm_workspace"] = max(round_up(gemm, PAGE), steps)
    apart["delta_workspace"] = round_up(workspace, step)
    pooled = sum(size for name, size, _ in lines if name not in apart)
    rounding = sum(apart.values()) + round_up(pooled, step) - sum(size for _, size, _ in lines)
    terms.append(term("buffers.rounding", "buffers", rounding, "formula", _STEPS))
    note = "loaded at their first launch"
    terms.append(term("kernel_modules", "buffers", constants.kernel_modules, "estimate", note))
    if meeting:
        note = "for prompts that meet in a forward, and for the next step, already prepared"
        terms.append(term("delta_workspace.more", "buffers", meeting, "estimate", note))
    return terms


def growth_terms(model: Model, largest: int, constants: EngineConstants) -> list[Term]:
    """Return the memory that pools take only at later requests.

    Holes in driver pools grow with the ``largest`` bytes of the executor's pool, up to a bound.
    """
    growth = constants.pool_growth
    grown = int(min(growth["most"], growth["share"] * largest))
    terms = [term("pool_growth", "buffers", grown, "estimate", "holes in driver pools")]
    if model.mrope:
        note = "M-RoPE positions, from a pool of the engine's thread, at the first image"
        terms.append(term("mrope_pool", "buffers", constants.pool_granularity, "formula", note))
    return terms


def _delta_workspaces(
    model: Model, settings: Settings, gpu: Gpu, constants: EngineConstants
) -> tuple[int, int]:
    """Return delta nets' workspace bytes after the warm-up, and the bytes that prompts may add."""
    delta, kernel = model.text.delta, constants.delta_kernel(capability_of(gpu))
    if delta is None or kernel is None:
        return 0, 0
    sms = known(gpu.sm_count, _MOST_SMS)
    warm = workspace(delta, settings, kernel, sms, warmup_tokens(settings, constants))
    most = meeting_workspace(delta, settings, kernel, sms, forward_tokens(settings))
    step = constants.pool_granularity
    return warm, max(0, round_up(most * phases_of(settings), step) - round_up(warm, step))


def warmup_tokens(settings: Settings, constants: EngineConstants) -> int:
    """Return the tokens of LMDeploy's longest warm-up request.

    The request fills a whole forward. If ``session_len`` is shorter than a forward, the request has
    the longest tuning length within ``session_len``.
    Source: lmdeploy 0.16.0 src/turbomind/turbomind.cc::WarmUp
    """
    tokens = forward_tokens(settings)
    if tokens <= settings.session_len:
        return tokens
    lengths = (n for n in constants.warmup_lengths if n <= min(tokens, settings.session_len))
    return max(lengths, default=0)


def transient_terms(
    pool: PoolModel,
    rule: ImageRule | None,
    settings: Settings,
    vision_load: VisionLoad,
    units_per_forward: int,
    constants: EngineConstants,
) -> tuple[Term, ...]:
    """Return the whole size of the pool in each worst case.

    One case is a single request. In all other cases, a forward is full of the longest prompts: at
    most ``session_len`` tokens of prompts, and one token for each row of the batch, up to the most
    tokens of a forward.
    """
    rows, context = settings.max_batch_size, settings.session_len
    tokens = min(pool.forward_tokens, round_up(context + rows, settings.tp))
    text = Forward(tokens=tokens, context=context)
    sampling = Forward(tokens=tokens, context=context, rows=rows, top_k_0=True)
    cases = [
        ("text_prefill", text, "longest prompts fill a forward"),
        ("sampling", sampling, f"{counted(rows, 'row')} with top_k=0"),
    ]
    if rule is not None and vision_load.units_per_image:
        units = vision_load.units_per_request
        prompt = vision_load.tokens_per_request + constants.kv_flatten_pad_tokens
        request = Forward(tokens=min(tokens, prompt), context=prompt, units=units)
        worst = replace(sampling, units=units_per_forward)
        note = f"one request, {counted(units, rule.unit_name)}"
        cases.append(("vision_request", request, note))
        many = plural(units_per_forward, rule.unit_name)
        note = f"{units_per_forward} {many} meet in one forward"
        cases.append(("vision_forward", worst, note))
    return transients(
        [(name, pool.peak(case), "formula", note) for name, case, note in cases],
        constants.pool_granularity,
    )


def _tp_problems(model: Model, tp: int) -> Iterator[str]:
    """Yield the numbers of a model that ``tp`` ranks cannot divide."""
    # lmdeploy builders/_base.py::_shard #8dce8b
    # lmdeploy builders/attention.py::_repeat_kv_heads #d96cf2
    text, vision = model.text, model.vision
    group = model.quantization.group_size if model.quantization else 1
    groups = text.heads * text.head_dim // group
    dealt = [
        (text.heads, f"{text.heads} attention heads"),
        (text.hidden, f"{text.hidden} hidden channels"),
        (groups, f"the output projection's {groups} groups of {group} channels"),
    ]
    if text.delta is not None:
        dealt.append((text.delta.key_heads, f"the delta nets' {text.delta.key_heads} key heads"))
    if vision is not None:
        width = vision_mlp_width(vision, tp)
        dealt.append((width, f"the vision tower's {vision.intermediate} channels"))
    if vision is not None and vision.kind != "internvit":
        dealt.append((vision.hidden * vision.merge**2, "the vision merger's channels"))
    yield from uneven(dealt, tp)
    kv_heads = kv_heads_held(text.kv_heads, tp)
    if kv_heads % text.kv_heads or text.heads % kv_heads:
        yield f"{text.kv_heads} KV heads cannot be repeated over {tp} ranks"


def _refused(launch: EngineLaunch, constants: EngineConstants) -> Iterator[str]:
    """Yield options that TurboMind refuses, that make TurboMind abort, or that garble answers.

    If ``--model-format`` contradicts a quantised checkpoint, an assertion fails; for 16-bit
    weights, the option changes only the data type.
    Source: lmdeploy turbomind/converter.py::get_tm_config #7c931e
    """
    model, settings = launch.model, launch.settings
    tokens, given = settings.cache_block_seq_len, settings.model_format
    if not 0 < settings.cache_max_entry_count < 1:
        yield "`--cache-max-entry-count` must lie between 0 and 1: TurboMind takes no block count"
    if settings.quant_policy not in (0, 4, 8):
        yield (
            f"`--quant-policy {settings.quant_policy}` does not run on TurboMind, which has 0, 4"
            " and 8: `--engine pytorch` takes 16 (fp8), 17 (fp8_e5m2) and 42 (turbo_quant)"
        )
    if settings.session_len < constants.warmup_lengths[0]:
        yield (
            f"a session of {settings.session_len} tokens is shorter than TurboMind's shortest"
            f" warm-up, {constants.warmup_lengths[0]} tokens"
        )
    stored = model.quantization.method if model.quantization else "hf"
    if given not in (None, stored):
        stored_as = stored if model.quantization else f"{model.dtype}, which is hf"
        yield f"`--model-format {given}`: the weights of {model.name} are stored in {stored_as}"
    ampere = all(capability_of(gpu) >= AMPERE for gpu in launch.gpus)
    multiple = _BLOCK if ampere else _BLOCK_BEFORE_AMPERE
    if tokens % multiple:
        yield (
            f"`--cache-block-seq-len {tokens}`: on these cards TurboMind needs a multiple of"
            f" {multiple}, which LMDeploy documents but does not check"
        )
    if settings.communicator != "nccl" and settings.tp > 1:
        yield from _communicator_problems(launch)


def _communicator_problems(launch: EngineLaunch) -> Iterator[str]:
    """Yield why ``cuda-ipc`` or ``native`` would abort: no peers, many ranks, a small buffer."""
    settings, gpus, vision = launch.settings, launch.gpus, launch.model.vision
    name = settings.communicator
    if settings.tp > _IPC_RANKS:
        yield f"`--communicator {name}` takes at most {_IPC_RANKS} GPUs"
    for a, b in combinations(gpus, 2):
        if not launch.machine.link(a.index, b.index).peers:
            pair = f"GPUs {a.index} and {b.index}"
            yield f"`--communicator {name}` needs peer access, which {pair} lack"
    if vision is not None and vision.kind != "internvit":
        needed = launch.vision_load.units_per_image * vision.hidden * 2
        size = symmetric_buffer(launch.model.text, settings)
        if needed > size:
            yield f"`--communicator {name}`: an image needs {needed} bytes of a buffer of {size}"


def missing_kernels(
    launch: EngineLaunch, census: Census | None, constants: EngineConstants
) -> Iterator[str]:
    """Yield sentences about code that the engine lacks for a card of the launch.

    Gated delta nets have a separate table; the engine stops if the table has no kernel for a card.
    Attention sinks keep the checkpoint's type: with another dtype the first request stops the
    engine ("f16 vs. bf16", seen on pretend GPUs). A family of kernels counts as present if one
    kernel has code; the engine may choose another kernel of the family.
    Source: lmdeploy 0.16.0 src/turbomind/kernels/linear_attn/delta_rule.cu::DeltaRule
    """
    model, dtype = launch.model, launch.settings.dtype
    cards = [(gpu, capability) for gpu in launch.gpus for capability in _capabilities(gpu)]
    for gpu, capability in cards if model.text.delta is not None else ():
        kernel = constants.delta_kernel(capability)
        if kernel is None:
            yield f"no kernel of gated delta nets for {gpu.name}"
        elif dtype not in kernel.dtypes:
            yield f"no kernel of gated delta nets with {dtype} for {gpu.name}"
    if census is None:
        return
    if model.text.sinks and dtype != model.dtype:
        yield f"no attention in {dtype} with sinks, which stay in the checkpoint's {model.dtype}"
    for gpu, capability in cards:
        if not census.has_ptx(capability):
            yield from _not_compiled(launch, census, gpu, capability)


def _not_compiled(
    launch: EngineLaunch, census: Census, gpu: Gpu, capability: tuple[int, int]
) -> Iterator[str]:
    """Yield the kinds of kernels that a launch needs but the library lacks for a card."""
    architecture = census.architecture(capability)
    card = f"{gpu.name} (compute capability {capability[0]}.{capability[1]})"
    if architecture is None:
        yield f"no code at all for {card}: its kernels are for {census.architecture_names()}"
        return
    for what, names in _needed(launch):
        count = census.count(names, architecture)
        if not count.code:
            empty = f": all {count.empty} are empty functions" if count.empty else ""
            yield f"no {what} for {card}{empty}"


def _capabilities(gpu: Gpu) -> tuple[tuple[int, int], ...]:
    """Return the compute capabilities that a card may have: one, if the capability is known."""
    return _ASSUMED if gpu.compute_capability == "NA" else (gpu.compute_capability,)


def _needed(launch: EngineLaunch) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each kind of kernel that a launch needs: a name in words, and families of kernels.

    At least one of the families must have code.

    cuBLAS multiplies 16-bit matrices, except for experts. A kernel for rows of experts also takes a
    single matrix. Source: lmdeploy 0.16.0 src/turbomind/kernels/gemm/kernel.cu::accept
    """
    model, dtype = launch.model, launch.settings.dtype
    weights: str | None = model.quantization.method if model.quantization else None
    weights = "int4" if weights in _INT4 else weights
    if weights is not None:
        both = families.gemm(weights, dtype), families.experts(weights, dtype)
        yield f"GEMM kernel for {weights} weights with {dtype}", both
    if model.text.moe is not None:
        kind = weights or dtype
        yield f"GEMM kernel for experts in {kind}", (families.experts(kind, dtype),)
    head_dim = model.text.head_dim
    yield f"attention kernel for {dtype}, head_dim {head_dim}", (families.prefill(dtype, head_dim),)
    kv = _KV.get(launch.settings.quant_policy, dtype)
    yield (
        f"attention kernel for {dtype} with {kv} KV, head_dim {head_dim}",
        (families.decode(dtype, kv, head_dim),),
    )


class TurbomindAccount(Account):
    """The account of one model with given settings on one group of GPUs."""

    cache_shortfall: str = (
        "that one warm-up request needs ({more} more), and LMDeploy waits without a message"
    )
    dies: ClassVar[str] = "aborts"
    #: On an H200, a server after the start held 250 to 350 MiB less memory than the ledger counted.
    grown: tuple[str, ...] = ("pool_growth", "mrope_pool")
    allocator: ClassVar[str] = "the executor's pool"
    shape: SlabShape
    #: The formulas; the class of a newer version may replace each formula (docs/adding.md).
    pool_model: ClassVar[type[PoolModel]] = PoolModel
    cache_shape = staticmethod(cache_shape)
    shape_of = staticmethod(shape_of)
    forward_tokens = staticmethod(forward_tokens)
    units_bound = staticmethod(engine_bound)
    warmup_tokens = staticmethod(warmup_tokens)
    before_terms = staticmethod(before_terms)
    weight_classes = staticmethod(weight_classes)
    weight_terms = staticmethod(weight_terms)
    temporary_bytes = staticmethod(temporary_bytes)
    loading_extra = staticmethod(loading_extra)
    staging_bytes = staticmethod(staging_bytes)
    buffer_terms = staticmethod(buffer_terms)
    transient_terms = staticmethod(transient_terms)

    def __init__(self, launch: EngineLaunch, constants: EngineConstants) -> None:
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        rule, vision_load = model.image_rule, launch.vision_load
        self.constants = constants
        self.shape = self.cache_shape(model.text, settings, constants)
        units = 0
        if rule is not None and vision_load.units_per_image:
            units = vision_load.budgeted_units(self.units_bound(rule, vision_load, settings))
        fuses = capability_of(gpus[0], unknown=FUSES_NOTHING)
        self.pool = pool = self.pool_model(model, settings, constants, fuses)
        transients = self.transient_terms(pool, rule, settings, vision_load, units, constants)
        # LMDeploy's warm-up is one text request.
        tokens = self.warmup_tokens(settings, constants)
        # The blocks of the longest warm-up request: with fewer blocks, the start never ends.
        self.least_blocks = -(-tokens // self.block_tokens)
        forward = Forward(tokens=tokens, context=tokens, first_layer=True)
        size = round_up(pool.peak(forward), constants.pool_granularity)
        warmup = term(POOL_WARMUP, "buffers", size, "formula", f"warm-up with {tokens} tokens")
        largest = max(case.bytes for case in (warmup, *transients))
        late = growth_terms(model, largest, constants)
        classes = self.weight_classes(model, settings.tp, constants, capability_of(gpus[0]))
        weights = sum(classes.values())
        # Equal cards have equal buffers, computed once: a search makes accounts by the thousand.
        kinds = [(gpu.l2, gpu.sm_count, gpu.compute_capability) for gpu in gpus]
        buffers = {
            kind: (*self.buffer_terms(model, settings, gpu, constants, weights), *late)
            for kind, gpu in dict(zip(kinds, gpus, strict=True)).items()
        }
        calibration = calibration_for(launch, "turbomind", constants.version)
        static = [
            corrected(replace(memory, buffers=buffers[kind]), calibration)
            for memory, kind in zip(self._loaded(launch, classes), kinds, strict=True)
        ]
        super().__init__(launch, static, warmup, transients, units, calibration)

    def _loaded(self, launch: EngineLaunch, classes: Mapping[str, int]) -> Iterator[StaticMemory]:
        """Yield each GPU's memory before the cache, with the additional bytes of loading."""
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        constants, capability = self.constants, capability_of(gpus[0])
        temporaries = self.temporary_bytes(model, settings, constants, capability)
        loading = self.loading_extra(model, settings, constants, capability)
        staged = round_up(loading, constants.pool_granularity)
        weights = self.weight_terms(model, classes, temporaries, constants)
        waiting = total_bytes([line for line in weights if line.term == TEMPORARIES])
        for gpu in gpus:
            # torch stages tensors on the first GPU
            first = self.staging_bytes(model, settings, constants) if gpu is gpus[0] else 0
            yield StaticMemory(
                before=(*self.before_terms(launch, gpu, constants), *weights),
                buffers=(),
                temporaries=waiting,
                staged=staged + first,
            )

    def region_at(self, ratio: float) -> int:
        return int(max(0, self.free) * ratio)

    def blocks_at(self, ratio: float) -> int:
        """Return the KV blocks for the single request of the warm-up."""
        return self.shape.tokens_beside(self.region_at(ratio), 1) // self.block_tokens

    def cache_terms(self, i: int, ratio: float) -> list[Term]:
        """Return the cache in whole steps of the cache's pool, and the freed temporaries."""
        rounded, temporaries = self._cache_bytes(i, ratio), self._static_memory[i].temporaries
        return cache_terms(rounded, ratio, temporaries, self.shape.state_bytes)

    def _cache_bytes(self, i: int, ratio: float) -> int:  # noqa: ARG002 - equal on all
        """Return the driver's bytes for the cache, without making terms, for speed."""
        return self.shape.held(self.region_at(ratio))


class Turbomind(Engine):
    """LMDeploy's engine in C++."""

    name: ClassVar[EngineName] = "turbomind"
    encodes_again: ClassVar[bool] = True
    tunes_kernels: ClassVar[bool] = True
    account_class: ClassVar[type[TurbomindAccount]] = TurbomindAccount

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.constants = constants = load_constants(version)
        self.pinned_call = constants.pinned_call

    def tp_problem(self, model: Model, tp: int) -> str | None:
        return next(_tp_problems(model, tp), None)

    def problem(self, launch: EngineLaunch) -> str | None:
        return next(_refused(launch, self.constants), None)

    def missing_kernels(self, launch: EngineLaunch) -> str | None:
        problems = missing_kernels(launch, self._census(launch), self.constants)
        problem = next(problems, None)
        return None if problem is None else f"TurboMind of LMDeploy {self.version} has {problem}"

    def _census(self, launch: EngineLaunch) -> Census | None:
        """Return the kernels of the installed engine, or of the wheel of the version; or None."""
        if launch.machine.source == "nvml" and not versions.is_legacy(self.version):
            from turbofit.machine.kernels.census import installed

            census = installed()
            if census is not None:
                return census
        version = versions.parse(self.version)
        return released(version) if version else None

    def forward_tokens(self, settings: Settings) -> int:
        return self.account_class.forward_tokens(settings)

    def prompt_tokens(self, settings: Settings) -> int:
        """Return the prompt tokens in a forward that also decodes one token of each request.

        The number is too low by fewer than ``tp`` tokens.
        """
        left = self.forward_tokens(settings) - settings.max_batch_size
        return left // settings.tp * settings.tp

    def logged_cache(self, slabs: Sequence[LoggedSlab], settings: Settings) -> CacheShape | None:
        blocks, *others = slabs
        states = tuple(
            StatePart(count=slab.each, object_bytes=slab.object_bytes, slab_bytes=slab.slab_bytes)
            for slab in others
        )
        return self.account_class.shape_of(blocks, states, settings, self.constants)

    def weights(self, model: Model, tp: int) -> RankWeights:
        return rank_weights(self.account_class.weight_classes(model, tp, self.constants))

    def environment(
        self,
        model: Model,
        settings: Settings,  # noqa: ARG002
        ledgers: Sequence[GpuLedger] = (),  # noqa: ARG002
    ) -> dict[str, str]:
        """Return the variables that set TurboMind's log to INFO, and 16-bit states in delta nets.

        TurboMind's own INFO prints no prompts; LMDeploy's INFO would.
        """
        env = {"TM_LOG_LEVEL": "INFO"}
        if model.text.delta is not None:
            env["LMDEPLOY_FP32_MAMBA_SSM_DTYPE"] = "0"  # states have 16 bits, as the plan counts
        return env

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Return the host memory: pinned by all ranks, and pageable of the server process.

        Each rank pins the pixels of one forward's images, once for each copy of a step's buffers.
        Pageable memory contains 32-bit pixels during preprocessing, for one request at a time.
        """
        pixels = model.pixel_bytes(units_per_forward)
        pinned = (pinned_buffers(model, settings) + pixels * phases_of(settings)) * settings.tp
        return HostMemory(
            pinned=pinned, pageable=self.constants.host_process + pixels * 3, available=None
        )
