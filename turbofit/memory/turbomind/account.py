"""TurboMind: every byte of one tensor-parallel group at any cache ratio, and what it refuses.

The lines of a ledger stand in the order in which TurboMind takes the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Final

from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, GpuLedger, HostMemory, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import format_bytes, round_up
from turbofit.kernels import families
from turbofit.kernels.census import Census, released
from turbofit.machine.presets import context_bytes
from turbofit.memory import versions
from turbofit.memory.account import (
    AMPERE,
    HOPPER,
    PAGE,
    POOL_WARMUP,
    TEMPORARIES,
    Account,
    Engine,
    EngineLaunch,
    Forward,
    LogFigures,
    RankWeights,
    StaticMemory,
    VisionLoad,
    capability_of,
    given,
    term,
    total_bytes,
    transients,
)
from turbofit.memory.calibrated import calibration_for, corrected
from turbofit.memory.kv_cache import CacheShape, LoggedSlab
from turbofit.memory.turbomind.cache import StatePart, cache_shape, shape_of
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

#: For `capability_of`: a card on which no layer fuses gate and up, whose forwards are the largest.
FUSES_NOTHING: Final = (8, 0)
#: Buffers outside every pool: the communicator's, and a cudaMalloc.
_ALONE = ("symmetric_buffer", "l2_flush")
#: Multiprocessors of a card that does not tell: more than any has, so over.
_MOST_SMS = 256
_KERNELS = "loaded at their first launch"
_STEPS = "pools grow by 32 MiB"
_TORCH_KERNELS = "torch's and the weight loader's"
_MROPE = "M-RoPE positions, from a pool of the engine's thread, at the first image"
_MEETING = "the same once prompts meet, and in the next step already prepared"
#: L2 where neither NVML nor a preset tells: the largest of any card, so over.
_LARGEST_L2 = 132 << 20
_IPC_RANKS = 8
#: Tokens of a KV block come in multiples of this, and of the other on cards before Ampere. LMDeploy
#: says so in `--help` and does not hold it; with 16 answers are garbled (lmdeploy#1195).
_BLOCK = 32
_BLOCK_BEFORE_AMPERE = 64
_INT4: Final = frozenset({"awq", "gptq", "compressed-tensors"})
_KV: Final = {4: "int4", 8: "int8"}
#: What a card of unknown compute capability is taken for: code must be there for all of them.
_ASSUMED: Final = ((8, 0), (8, 6), (8, 9), (9, 0))


def before_terms(
    gpu: Gpu, settings: Settings, linked: bool, constants: EngineConstants
) -> list[Term]:
    """What one GPU holds before the weights: others, the context, kernels, the communicator.

    ``linked``: NVLink joins every pair of the group.
    """
    hopper = capability_of(gpu) >= HOPPER
    context, note = context_bytes(gpu)
    handles = constants.cublas_handles
    workspaces = handles * constants.cublas_handle["hopper" if hopper else "default"]
    terms = [
        term("others", "before", known(gpu.used, 0), "measured", "held by others"),
        term("cuda_context", "context", context, "estimate", note),
        term("cublas", "context", workspaces, "estimate", f"{handles} handles' workspaces"),
        term("torch_kernels", "context", constants.torch_kernels, "estimate", _TORCH_KERNELS),
    ]
    if settings.tp > 1:
        note = f"{settings.communicator}, {settings.tp} ranks"
        # NCCL's buffers by class of link, as measured; cuda-ipc's own, as its source says.
        kind = "host" if not linked else "nvlink_hopper" if hopper else "nvlink"
        links = term("communicator", "context", constants.nccl_buffers[kind], "estimate", note)
        if settings.communicator != "nccl":
            size = constants.ipc_packet + constants.ipc_scratch + PAGE
            links = term("communicator", "context", size, "formula", note)
        terms.append(links)
    if constants.gemm_in_context:
        # Of the weights' pool, as on a card: whole steps are over where it fits beside them.
        size = round_up(sum(constants.gemm_in_context), constants.pool_granularity)
        note = "barriers, partials, tensor maps"
        terms.append(term("gemm_workspace", "context", size, "formula", note))
    return terms


def weight_terms(
    model: Model, classes: Mapping[str, int], temporaries: int, constants: EngineConstants
) -> list[Term]:
    """The weights of one rank by tensor class, and what loading has not given back yet."""
    basis = model.source.sizes
    terms = [term(f"weights.{name}", "weights", size, basis) for name, size in classes.items()]
    total = sum(classes.values())
    rounded = round_up(total, constants.pool_granularity)
    terms.append(term("weights.rounding", "weights", rounded - total, "formula", _STEPS))
    # They share the weights' pool. One step too much would be a cache larger than planned.
    waiting = round_up(total + temporaries, constants.pool_granularity) - rounded
    if waiting:
        note = "freed, but not returned yet when free memory is read"
        terms.append(term(TEMPORARIES, "weights", waiting, "formula", note))
    return terms


def rank_weights(classes: Mapping[str, int]) -> RankWeights:
    """All, without the embedding's table, and the tower alone."""
    total = sum(classes.values())
    vision = classes.get("vision", 0) + classes.get("projector", 0)
    return RankWeights(total=total, decode=total - vision - classes["embedding"], vision=vision)


def cache_terms(region: int, ratio: float, temporaries: int, state: int = 0) -> list[Term]:
    """The cache, and what becomes of the temporaries that made it smaller.

    A driver keeps what was freed until the next synchronisation, and the engine makes none between
    (seen on an H200: bench/gpu/results/h200, a-pool). ``state`` bytes of the cache are each running
    sequence's of a hybrid model.
    """
    note = f"{ratio:.3f} of free memory"
    if state:
        note += f"; each running sequence's state takes {format_bytes(state)} of it"
    terms = [term("kv_cache", "cache", region, "formula", note)]
    if temporaries:
        note = "returned at the next synchronisation"
        terms.append(term(f"{TEMPORARIES}.returned", "cache", -temporaries, "formula", note))
    return terms


def buffer_terms(
    model: Model, settings: Settings, gpu: Gpu, constants: EngineConstants, weights: int
) -> list[Term]:
    """What one GPU holds for good after the cache, without the executor's pool.

    The GEMM workspace comes from the pool of the ``weights``: what their last step does not hold
    takes steps of its own. The workspace of delta nets is a pool by itself.
    """
    step = constants.pool_granularity
    lines = list(device_buffers(model, settings, constants, known(gpu.l2, _LARGEST_L2)))
    workspace, meeting = _delta_workspaces(model, settings, gpu, constants)
    if workspace:
        lines.append(("delta_workspace", workspace, "gated delta nets, for the warm-up's prompt"))
    terms = [term(name, "buffers", size, "formula", note) for name, size, note in lines]
    alone = {name: round_up(size, PAGE) for name, size, _ in lines if name in _ALONE}
    gemm = sum(constants.gemm_workspace)
    steps = round_up(weights + gemm, step) - round_up(weights, step)
    # Over by a page or two where the weights' last step holds a part of it.
    alone["gemm_workspace"] = max(round_up(gemm, PAGE), steps)
    alone["delta_workspace"] = round_up(workspace, step)
    pooled = sum(size for name, size, _ in lines if name not in alone)
    rounding = sum(alone.values()) + round_up(pooled, step) - sum(size for _, size, _ in lines)
    more = [term("delta_workspace.more", "buffers", meeting, "estimate", _MEETING)]
    return [
        *terms,
        term("buffers.rounding", "buffers", rounding, "formula", _STEPS),
        term("kernel_modules", "buffers", constants.kernel_modules, "estimate", _KERNELS),
        *(more if meeting else ()),
    ]


def _delta_workspaces(
    model: Model, settings: Settings, gpu: Gpu, constants: EngineConstants
) -> tuple[int, int]:
    """Bytes that kernels of gated delta nets hold after the warm-up, and those that prompts add."""
    delta, kernel = model.text.delta, constants.delta_kernel(capability_of(gpu))
    if delta is None or kernel is None:
        return 0, 0
    sms = known(gpu.sm_count, _MOST_SMS)
    warm = workspace(delta, settings, kernel, sms, warmup_tokens(settings, constants))
    most = meeting_workspace(delta, settings, kernel, sms, forward_tokens(settings))
    step = constants.pool_granularity
    return warm, max(0, round_up(most * phases_of(settings), step) - round_up(warm, step))


def warmup_tokens(settings: Settings, constants: EngineConstants) -> int:
    """Tokens of LMDeploy's longest warm-up request.

    A whole forward where ``session_len`` admits it, else the longest tuning length that it admits.
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
    """The pool's full size in each worst case.

    Every case but the single request assumes a full forward of the longest prompts: as many tokens
    as a forward takes, or, where that is less, as prompts that meet may have in all
    (``session_len``) beside a batch of rows that generate one each.
    """
    rows, context = settings.max_batch_size, settings.session_len
    tokens = min(pool.forward_tokens, round_up(context + rows, settings.tp))
    text = Forward(tokens=tokens, context=context)
    sampling = Forward(tokens=tokens, context=context, rows=rows, top_k_0=True)
    cases = [
        ("text_prefill", text, "longest prompts fill a forward"),
        ("sampling", sampling, f"{rows} rows with top_k=0"),
    ]
    if rule is not None and vision_load.units_per_image:
        units = vision_load.units_per_request
        prompt = vision_load.tokens_per_request + constants.kv_flatten_pad_tokens
        request = Forward(tokens=min(tokens, prompt), context=prompt, units=units)
        worst = replace(sampling, units=units_per_forward)
        note = f"one request, {units} {plural(units, rule.unit_name)}"
        cases.append(("vision_request", request, note))
        many = plural(units_per_forward, rule.unit_name)
        note = f"{units_per_forward} {many} meet in one forward"
        cases.append(("vision_forward", worst, note))
    return transients(
        [(name, pool.peak(case), "formula", note) for name, case, note in cases],
        constants.pool_granularity,
    )


def _tp_problems(model: Model, tp: int) -> Iterator[str]:
    # lmdeploy builders/_base.py::_shard #8dce8b
    # lmdeploy builders/attention.py::_repeat_kv_heads #d96cf2
    text, vision = model.text, model.vision
    if text.heads % tp:
        yield f"{text.heads} attention heads do not divide by {tp}"
    if text.hidden % tp:
        yield f"hidden size {text.hidden} does not divide by {tp}"
    if text.delta is not None and text.delta.key_heads % tp:
        yield f"the delta nets' {text.delta.key_heads} key heads do not divide by {tp}"
    kv_heads = kv_heads_held(text.kv_heads, tp)
    if kv_heads % text.kv_heads or text.heads % kv_heads:
        yield f"{text.kv_heads} KV heads cannot be repeated over {tp} ranks"
    group = model.quantization.group_size if model.quantization else 1
    if text.heads * text.head_dim // group % tp:
        yield f"the output projection's groups of {group} do not divide by {tp}"
    if vision is None:
        return
    if vision_mlp_width(vision, tp) % tp:
        yield f"the vision tower's intermediate size {vision.intermediate} does not divide by {tp}"
    if vision.kind != "internvit" and vision.hidden * vision.merge**2 % tp:
        yield f"the vision merger's width does not divide by {tp}"


def _refused(launch: EngineLaunch, constants: EngineConstants) -> Iterator[str]:
    """Options that TurboMind refuses, aborts on, or that garble its answers.

    A format beside the checkpoint's own is an assertion; on 16-bit weights it finds none to read
    and changes the data type alone. Source: lmdeploy turbomind/converter.py::get_tm_config #7c931e
    """
    model, settings = launch.model, launch.settings
    tokens, given = settings.cache_block_seq_len, settings.model_format
    if not 0 < settings.cache_max_entry_count < 1:
        yield "--cache-max-entry-count must lie between 0 and 1: TurboMind takes no block count"
    if settings.quant_policy not in (0, 4, 8):
        yield (
            f"--quant-policy {settings.quant_policy} does not run on TurboMind, whose caches are 0,"
            " 4 and 8: --engine pytorch takes 16 (fp8), 17 (fp8_e5m2) and 42 (turbo_quant)"
        )
    if settings.session_len < constants.warmup_lengths[0]:
        yield (
            f"a session of {settings.session_len} tokens is shorter than TurboMind's shortest"
            f" warm-up, {constants.warmup_lengths[0]} tokens"
        )
    stored = model.quantization.method if model.quantization else "hf"
    if given not in (None, stored):
        stored_as = stored if model.quantization else f"{model.dtype}, which is hf"
        yield f"--model-format {given}: the weights of {model.name} are stored in {stored_as}"
    ampere = all(capability_of(gpu) >= AMPERE for gpu in launch.gpus)
    multiple = _BLOCK if ampere else _BLOCK_BEFORE_AMPERE
    if tokens % multiple:
        yield (
            f"--cache-block-seq-len {tokens}: on these cards TurboMind needs a multiple of"
            f" {multiple}, which LMDeploy says and does not check"
        )
    if settings.communicator != "nccl" and settings.tp > 1:
        yield from _communicator_problems(launch)


def _communicator_problems(launch: EngineLaunch) -> Iterator[str]:
    """Why ``cuda-ipc`` (or ``native``) would abort: no peers, many ranks, a small buffer."""
    settings, gpus, vision = launch.settings, launch.gpus, launch.model.vision
    name = settings.communicator
    if settings.tp > _IPC_RANKS:
        yield f"--communicator {name} takes at most {_IPC_RANKS} GPUs"
    for k, a in enumerate(gpus):
        for b in gpus[:k]:
            if not launch.machine.link(a.index, b.index).peers:
                pair = f"GPUs {b.index} and {a.index}"
                yield f"--communicator {name} needs peer access, which {pair} lack"
    if vision is not None and vision.kind != "internvit":
        needed = launch.vision_load.units_per_image * vision.hidden * 2
        size = symmetric_buffer(launch.model.text, settings)
        if needed > size:
            yield f"--communicator {name}: an image needs {needed} bytes of a buffer of {size}"


def missing_kernels(
    launch: EngineLaunch, census: Census | None, constants: EngineConstants
) -> Iterator[str]:
    """What the engine has no code for on one of these cards, in words.

    Gated delta nets have a table of their own; without a kernel in it the engine ends.
    Source: lmdeploy 0.16.0 src/turbomind/kernels/linear_attn/delta_rule.cu::DeltaRule
    Attention sinks stay in the checkpoint's type: in another one the first request ends the engine
    ("f16 vs. bf16", seen on pretend GPUs). A family of kernels counts as there when one of them has
    code. Under: the engine may choose another one.
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
    """Kernels that a launch needs, and of which the library has none for a card."""
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
    """The card's compute capability; of a card of which it is unknown all that are assumed."""
    return _ASSUMED if gpu.compute_capability == "NA" else (gpu.compute_capability,)


def _needed(launch: EngineLaunch) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Kernels in words, and the families of which one must have code.

    Matrices of 16 bits are cuBLAS's, but for experts. A kernel for rows of experts takes one matrix
    too. Source: lmdeploy 0.16.0 src/turbomind/kernels/gemm/kernel.cu::accept
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
    """One model under one set of settings on one group of GPUs."""

    cache_shortfall: str = (
        "that one warm-up request needs ({more} more), and LMDeploy waits without a word"
    )
    dies: ClassVar[str] = "aborts"
    #: On an H200 a server that had started held 250 to 350 MiB less than was charged.
    grown: ClassVar[tuple[str, ...]] = ("pool_growth", "mrope_pool")
    allocator: ClassVar[str] = "the executor's pool"
    #: Its formulas, each of which a newer version's class can have otherwise (docs/adding.md).
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
        self.block_bytes, self.block_tokens = self.shape.block_bytes, self.shape.block_tokens
        units = 0
        if rule is not None and vision_load.units_per_image:
            units = vision_load.budgeted_units(self.units_bound(rule, vision_load, settings))
        fuses = capability_of(gpus[0], unknown=FUSES_NOTHING)
        self.pool = pool = self.pool_model(model, settings, constants, fuses)
        transients = self.transient_terms(pool, rule, settings, vision_load, units, constants)
        # LMDeploy's own warm-up is one request of text; the pools hold more than their tensors.
        tokens = self.warmup_tokens(settings, constants)
        # The longest request of the warm-up: with fewer blocks, start-up never ends.
        self.least_blocks = -(-tokens // self.block_tokens)
        step, growth = constants.pool_granularity, constants.pool_growth
        size = self.forward_bytes(Forward(tokens=tokens, context=tokens, first_layer=True))
        warmup = term(POOL_WARMUP, "buffers", size, "formula", f"warm-up with {tokens} tokens")
        largest = max(case.bytes for case in (warmup, *transients))
        grown = int(min(growth["most"], growth["share"] * largest))
        late = [term("pool_growth", "buffers", grown, "estimate", "holes in driver pools")]
        if model.mrope:
            late.append(term("mrope_pool", "buffers", step, "formula", _MROPE))
        classes = self.weight_classes(model, settings.tp, constants, capability_of(gpus[0]))
        weights = sum(classes.values())
        # Equal cards have equal buffers, and a search makes accounts by the thousand.
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
        """What each GPU holds before the cache, and what loading holds above it."""
        model, settings, gpus = launch.model, launch.settings, launch.gpus
        if launch.free_at_cache is not None:
            for gpu in gpus:
                yield StaticMemory(before=(given(gpu, launch.free_at_cache),), buffers=())
            return
        constants, capability = self.constants, capability_of(gpus[0])
        temporaries = self.temporary_bytes(model, settings, constants, capability)
        loading = self.loading_extra(model, settings, constants, capability)
        staged = round_up(loading, constants.pool_granularity)
        linked = launch.machine.nvlinked(gpus)
        weights = self.weight_terms(model, classes, temporaries, constants)
        waiting = total_bytes([line for line in weights if line.term == TEMPORARIES])
        for gpu in gpus:
            # The first GPU stages tensors through torch.
            first = self.staging_bytes(model, settings, constants) if gpu is gpus[0] else 0
            yield StaticMemory(
                before=(*self.before_terms(gpu, settings, linked, constants), *weights),
                buffers=(),
                temporaries=waiting,
                staged=staged + first,
            )

    def region_at(self, ratio: float) -> int:
        return int(max(0, self.free) * ratio)

    def tokens_at(self, ratio: float) -> int:
        return self.shape.tokens(self.region_at(ratio))

    def forward_bytes(self, forward: Forward) -> int:
        """What one forward takes of the executor's pool, in whole steps."""
        return round_up(self.pool.peak(forward), self.constants.pool_granularity)

    def blocks_at(self, ratio: float) -> int:
        """KV blocks for the warm-up's one request."""
        return self.shape.tokens_beside(self.region_at(ratio), 1) // self.block_tokens

    def cache_terms(self, i: int, ratio: float) -> list[Term]:
        """The cache in whole steps of its pool, and the temporaries that go."""
        rounded, temporaries = self._cache_bytes(i, ratio), self._static_memory[i].temporaries
        return cache_terms(rounded, ratio, temporaries, self.shape.state_bytes)

    def _cache_bytes(self, i: int, ratio: float) -> int:  # noqa: ARG002 - equal on all
        """Without terms, since a search asks this most; the temporaries cancel out."""
        return self.shape.held(self.region_at(ratio))


class Turbomind(Engine):
    """LMDeploy's C++ engine."""

    name: ClassVar[EngineName] = "turbomind"
    encodes_again: ClassVar[bool] = True
    tunes_kernels: ClassVar[bool] = True
    account_class: ClassVar[type[TurbomindAccount]] = TurbomindAccount

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.constants = constants = load_constants(version)
        self.log = LogFigures(constants.pinned_call, constants.warmup_lengths)

    def account(self, launch: EngineLaunch) -> Account:
        return self.account_class(launch, self.constants)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        return next(_tp_problems(model, tp), None)

    def problem(self, launch: EngineLaunch) -> str | None:
        return next(_refused(launch, self.constants), None)

    def missing_kernels(self, launch: EngineLaunch) -> str | None:
        problems = missing_kernels(launch, self._census(launch), self.constants)
        problem = next(problems, None)
        return None if problem is None else f"TurboMind of LMDeploy {self.version} has {problem}"

    def _census(self, launch: EngineLaunch) -> Census | None:
        """The kernels of what is installed here, or of its version's wheel; None: not read."""
        if launch.machine.source == "nvml" and not versions.is_legacy(self.version):
            from turbofit.kernels.installed import installed

            census = installed()
            if census is not None:
                return census
        version = versions.parse(self.version)
        return released(version) if version else None

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        return self.account_class.units_bound(rule, vision_load, settings)

    def forward_tokens(self, settings: Settings) -> int:
        return self.account_class.forward_tokens(settings)

    def prompt_tokens(self, settings: Settings) -> int:
        """A row that decodes takes a token of the same forward. Under: by less than ``tp``."""
        left = self.forward_tokens(settings) - settings.max_batch_size
        return left // settings.tp * settings.tp

    def cache(self, model: Model, settings: Settings) -> CacheShape:
        return self.account_class.cache_shape(model.text, settings, self.constants)

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
        """LMDeploy's own INFO prints prompts; TurboMind's does not."""
        env = {"TM_LOG_LEVEL": "INFO"}
        if model.text.delta is not None:
            env["LMDEPLOY_FP32_MAMBA_SSM_DTYPE"] = "0"  # states are counted at 16 bits
        return env

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """Pinned by every rank, pageable by the server process.

        Pixels are pinned by each rank for the images of one forward, once for each phase; pageable
        memory holds them in 32 bits while they are preprocessed, one request at a time.
        """
        pixels = model.pixel_bytes(units_per_forward)
        pinned = (pinned_buffers(model, settings) + pixels * phases_of(settings)) * settings.tp
        pageable = self.constants.host_process + pixels * 3
        return HostMemory(pinned=pinned, pageable=pageable, available=None)

    def prefill_words(self, settings: Settings) -> str:
        tokens = self.account_class.warmup_tokens(settings, self.constants)
        return f"LMDeploy warms up with {tokens} tokens"
