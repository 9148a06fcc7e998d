"""The named lines of a ledger, in the order in which TurboMind takes the memory."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.images import ImageRule
from turbofit.core.machine import Gpu
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.plan import Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import format_bytes, round_up
from turbofit.machine.presets import context_bytes
from turbofit.memory.account import TEMPORARIES
from turbofit.memory.shared_terms import HOPPER, POOL_WARMUP, capability_of, term, transients
from turbofit.memory.turbomind.buffers import device_buffers
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.delta import meeting_workspace, workspace
from turbofit.memory.turbomind.pool import Forward, PoolModel, forward_tokens
from turbofit.memory.turbomind.weights import weight_classes
from turbofit.memory.vision_load import VisionLoad

__all__ = [
    "FUSES_NOTHING",
    "before_terms",
    "buffer_terms",
    "cache_terms",
    "transient_terms",
    "warmup_term",
    "warmup_tokens",
    "weight_terms",
]

#: For `capability_of`: a card on which no layer fuses gate and up, whose forwards are the largest.
FUSES_NOTHING: Final = (8, 0)

#: Buffers outside the rank's pool: the default pool's, the communicator's, and a cudaMalloc.
_ALONE = ("gemm_workspace", "symmetric_buffer", "l2_flush", "delta_workspace")

#: Multiprocessors of a card that does not tell: more than any has, so over.
_MOST_SMS = 256
_MEETING = "the same once prompts meet, and in the next step already prepared"

#: L2 where neither NVML nor a preset tells: the largest of any card, so over.
_LARGEST_L2 = 132 << 20


def before_terms(
    gpu: Gpu, settings: Settings, first: bool, linked: bool, constants: EngineConstants
) -> list[Term]:
    """What one GPU holds before the weights: others, the context, the communicator.

    Args:
        gpu: the card.
        settings: the engine's options.
        first: whether it is the group's first GPU, which has more cuBLAS handles.
        linked: whether NVLink joins every pair of the group.
        constants: the generation's figures.
    """
    hopper = capability_of(gpu) >= HOPPER
    context, note = context_bytes(gpu)
    handles = constants.cublas_handles["first" if first else "other"]
    handle = constants.cublas_handle["hopper" if hopper else "default"]
    terms = [
        term("others", "before", known(gpu.used, 0), "measured", "held by others"),
        term("cuda_context", "context", context, "estimate", note),
        term("cublas", "context", handles * handle, "estimate", f"{handles} handles' workspaces"),
    ]
    if settings.tp > 1:
        terms.append(_communicator(settings, linked, hopper, constants))
    if constants.gemm_in_context:
        size = round_up(sum(constants.gemm_in_context), constants.pool_granularity)
        note = "barriers, partials, tensor maps"
        terms.append(term("gemm_workspace", "context", size, "formula", note))
    return terms


def weight_terms(
    model: Model,
    settings: Settings,
    temporaries: int,
    constants: EngineConstants,
    capability: tuple[int, int],
) -> list[Term]:
    """The weights of one rank by tensor class, and what loading has not given back yet."""
    basis = model.source.sizes
    classes = weight_classes(model, settings.tp, constants, capability)
    terms = [term(f"weights.{name}", "weights", size, basis) for name, size in classes.items()]
    total = sum(classes.values())
    rounding = round_up(total, constants.pool_granularity) - total
    terms.append(term("weights.rounding", "weights", rounding, "formula", "whole 2 MiB pages"))
    if temporaries:
        note = "freed, but not returned yet when free memory is read"
        terms.append(term(TEMPORARIES, "weights", temporaries, "formula", note))
    return terms


def cache_terms(region: int, ratio: float, temporaries: int, state: int = 0) -> list[Term]:
    """The cache, and what becomes of the temporaries that made it smaller.

    ``state`` bytes of the cache are each running sequence's of a hybrid model.
    """
    note = f"{ratio:.3f} of free memory"
    if state:
        note += f"; each running sequence's state takes {format_bytes(state)} of it"
    terms = [term("kv_cache", "cache", region, "formula", note)]
    if temporaries:
        # Never seen on a real driver: were they returned before free memory is read, the cache
        # would be this much larger. Over where they are not.
        note = "the cache would be larger if the driver returned load_temporaries early"
        terms.append(term("cache_uncertainty", "cache", int(temporaries * ratio), "estimate", note))
        note = "returned at the next synchronisation"
        terms.append(term(f"{TEMPORARIES}.returned", "cache", -temporaries, "formula", note))
    return terms


def buffer_terms(
    model: Model, settings: Settings, gpu: Gpu, constants: EngineConstants
) -> list[Term]:
    """What one GPU holds for good after the cache, without the pool."""
    lines = list(device_buffers(model, settings, constants, known(gpu.l2, _LARGEST_L2)))
    workspace, meeting = _delta_workspaces(model, settings, gpu, constants)
    if workspace:
        lines.append(("delta_workspace", workspace, "gated delta nets, for the warm-up's prompt"))
    terms = [term(name, "buffers", size, "formula", note) for name, size, note in lines]
    # Some of them are allocations of their own; the rest share the rank's pool.
    alone = [size for name, size, _ in lines if name in _ALONE]
    pooled = sum(size for name, size, _ in lines if name not in _ALONE)
    rounding = sum(round_up(s, constants.pool_granularity) - s for s in (*alone, pooled))
    images = constants.kernel_images
    major, minor = capability_of(gpu)
    wanted = major * 10 + minor
    image = images[max((key for key in images if key <= wanted), default=max(images))]
    return [
        *terms,
        term("buffers.rounding", "buffers", rounding, "formula", "whole 2 MiB pages"),
        term("kernel_modules", "buffers", image, "estimate", "every kernel of the engine loaded"),
        term("pool_growth", "buffers", constants.pool_growth, "estimate", "steps of driver pools"),
        *(
            [term("delta_workspace.more", "buffers", meeting, "estimate", _MEETING)]
            if meeting
            else []
        ),
    ]


def _delta_workspaces(
    model: Model, settings: Settings, gpu: Gpu, constants: EngineConstants
) -> tuple[int, int]:
    """What the kernels of gated delta nets hold after the warm-up, and what prompts then add."""
    delta, kernel = model.text.delta, constants.delta_kernel(capability_of(gpu))
    if delta is None or kernel is None:
        return 0, 0
    sms = known(gpu.sm_count, _MOST_SMS)
    warm = workspace(delta, settings, kernel, sms, warmup_tokens(settings, constants))
    most = meeting_workspace(delta, settings, kernel, sms, forward_tokens(settings))
    page, phases = constants.pool_granularity, 2 if settings.async_ else 1
    return warm, max(0, round_up(most * phases, page) - round_up(warm, page))


def warmup_tokens(settings: Settings, constants: EngineConstants) -> int:
    """Tokens of LMDeploy's longest warm-up request.

    A whole forward where ``session_len`` admits it, else the longest tuning length that it admits.
    Source: LMDeploy turbomind.cc, gemm/tuner/params.cc.
    """
    tokens = round_up(settings.max_prefill_token_num + settings.max_batch_size, settings.tp)
    if tokens <= settings.session_len:
        return tokens
    lengths = (n for n in constants.warmup_lengths if n <= min(tokens, settings.session_len))
    return max(lengths, default=0)


def warmup_term(pool: PoolModel, settings: Settings, constants: EngineConstants) -> Term:
    """The executor pool after LMDeploy's own warm-up: text only, one request."""
    tokens = warmup_tokens(settings, constants)
    size = pool.peak(Forward(tokens=tokens, context=tokens, first_layer=True))
    size = round_up(size, constants.pool_granularity)
    return term(POOL_WARMUP, "buffers", size, "formula", f"warm-up with {tokens} tokens")


def transient_terms(
    pool: PoolModel,
    rule: ImageRule | None,
    settings: Settings,
    vision_load: VisionLoad,
    units_per_forward: int,
    constants: EngineConstants,
) -> tuple[Term, ...]:
    """The pool's full size in each worst case; the largest is marked as the one that decides.

    Every case but the single request assumes a full forward of the longest prompts: as many tokens
    as a forward takes, or as prompts that meet may have in all (``session_len``) beside a batch of
    rows that generate one each, where that is less.
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
        one = f"one request, {units} {plural(units, rule.unit_name)}"
        cases.append(("vision_request", request, one))
        many = plural(units_per_forward, rule.unit_name)
        note = f"{units_per_forward} {many} meet in one forward"
        cases.append(("vision_forward", worst, note))
    sizes = [round_up(pool.peak(case), constants.pool_granularity) for _, case, _ in cases]
    return transients(
        [(name, size, "formula", note) for (name, _, note), size in zip(cases, sizes, strict=True)]
    )


def _communicator(
    settings: Settings, linked: bool, hopper: bool, constants: EngineConstants
) -> Term:
    """NCCL's buffers by link class, from measurements; cuda-ipc's own, from its source."""
    note = f"{settings.communicator}, {settings.tp} ranks"
    if settings.communicator == "nccl":
        kind = "host" if not linked else "nvlink_hopper" if hopper else "nvlink"
        return term("communicator", "context", constants.nccl_buffers[kind], "estimate", note)
    page = constants.pool_granularity
    size = round_up(constants.ipc_packet, page) + round_up(constants.ipc_scratch, page) + page
    return term("communicator", "context", size, "formula", note)
