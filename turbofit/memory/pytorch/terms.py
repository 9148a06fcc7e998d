"""The named lines of a ledger, in the order in which the PyTorch engine takes the memory."""

from __future__ import annotations

from turbofit.core.machine import Gpu
from turbofit.core.messages import plural
from turbofit.core.model import Model
from turbofit.core.plan import Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import MIB, round_up
from turbofit.machine.presets import context_bytes
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.bound import UnitsMet
from turbofit.memory.pytorch.cache import state_slots
from turbofit.memory.pytorch.constants import PytorchConstants
from turbofit.memory.pytorch.draft import draft_terms
from turbofit.memory.pytorch.environment import segments
from turbofit.memory.pytorch.weights import is_copied, packed_copy, weight_classes
from turbofit.memory.shared_terms import HOPPER, POOL_WARMUP, capability_of, term, transients
from turbofit.memory.vision_load import VisionLoad

__all__ = [
    "before_terms",
    "buffer_terms",
    "cache_term",
    "capture_sizes",
    "pool_term",
    "state_term",
    "transient_terms",
    "weight_terms",
]

_INT = 4
#: Blocks from this on come from segments of 20 MiB. Source: c10/cuda/CUDACachingAllocator.
_LARGE_BLOCK = MIB


def before_terms(
    gpu: Gpu, settings: Settings, linked: bool, constants: PytorchConstants
) -> list[Term]:
    """What one GPU holds before the weights: others, contexts, the communicator.

    Args:
        gpu: the card.
        settings: the engine's options.
        linked: whether NVLink joins every pair of the group.
        constants: the generation's figures.
    """
    # The front end only asks torch for the card's properties: no context on pretend GPUs. Under
    # where it makes one on a real card, by what the ratio leaves of it: free memory is read later.
    context, note = context_bytes(gpu)
    terms = [
        term("others", "before", known(gpu.used, 0), "measured", "held by others"),
        term("cuda_context", "context", context, "estimate", note),
    ]
    if settings.tp > 1:
        hopper = capability_of(gpu) >= HOPPER
        kind = "host" if not linked else "nvlink_hopper" if hopper else "nvlink"
        size, note = constants.nccl_buffers[kind], f"NCCL, {settings.tp} ranks"
        terms.append(term("communicator", "context", size, "estimate", note))
    return terms


def weight_terms(
    model: Model, settings: Settings, capability: tuple[int, int], constants: PytorchConstants
) -> list[Term]:
    """The weights of one rank by class, and what loading leaves unusable between them."""
    basis = model.source.sizes
    classes = weight_classes(model, settings.tp)
    terms = [term(f"weights.{name}", "weights", size, basis) for name, size in classes.items()]
    terms += draft_terms(model, settings)
    copied = packed_copy(model, settings.tp, capability, constants)
    if copied:
        note = "of what AWQ packed, for TurboMind's kernels, which the engine takes on Hopper"
        terms.append(term("weights.packed_copy", "weights", copied, "estimate", note))
    kind = segments(settings)
    fragmented = constants.load_fragmentation[kind]
    if model.text.moe is not None:
        # Experts that are laid out anew leave a segment more in part: 33 MiB on pretend GPUs.
        fragmented += constants.segment
    if settings.draft is not None:
        # So does a draft, whose embeddings are replaced: 31 MiB on pretend GPUs.
        fragmented += constants.segment
    note = f"torch's {kind} segments, filled in part"
    terms.append(term("load_fragmentation", "weights", fragmented, "estimate", note))
    return terms


def capture_sizes(settings: Settings) -> list[int]:
    """Batch sizes for which a CUDA graph is captured. Source: graph_runner/runner.py."""
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
    """What one GPU holds for good after the cache.

    Args:
        model: the checkpoint.
        work: the model's stages.
        settings: the engine's options.
        gpu: the card.
        most_blocks: KV blocks at most, which every graph has a table of.
        constants: the generation's figures.
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
        tables = sum(captured) * most_blocks * _INT * work.graphs + work.graph_buffers(captured)
        # Torch keeps what graphs allocated apart: no prefill ever has room in it.
        note = "each CUDA graph's table of blocks, and the graphs' own pool"
        size = tables + _step_pool(work, settings, constants)
        terms.append(term("cuda_graphs", "buffers", size, "formula", note))
    note = "kernels loaded lazily"
    terms.append(term("kernel_modules", "buffers", constants.kernel_modules, "estimate", note))
    return terms


def pool_term(work: Activations, settings: Settings, constants: PytorchConstants) -> Term:
    """What torch keeps after the warm-up for any later forward: a prefill of one token a row."""
    size, note = _step_pool(work, settings, constants), "an eager pass"
    if work.decode(settings.max_batch_size) >= _LARGE_BLOCK:  # Over: the MLP's is a part of it
        # Picking the experts' kernels leaves another one. Seen on pretend GPUs: 143 MiB of 152.
        size += constants.segment * (2 if work.text.moe else 1)
    size += round_up(work.delta_warmup(settings.max_batch_size), constants.page)
    size += work.further_pool()
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
    """The most that torch's allocator holds above what stays, in each worst case.

    The largest is marked as the one that decides. Each holds what lies unusable between live
    blocks, at least the last page of torch's large and of its small blocks.
    """
    sequences = settings.max_batch_size
    # Whole prompts join a forward, so that one may hold more tokens than a session; beside them the
    # last chunk of a long one sees its whole context.
    most = sequences * settings.session_len
    prompt = min(settings.max_prefill_token_num, most)
    context = min(settings.session_len + prompt, most)
    rule = model.image_rule
    kept = work.tables() if rule is not None and vision_load.units_per_image else 0
    text = work.prefill(Prefill(tokens=prompt, context=context, sequences=sequences))
    cases: list[tuple[str, int, str]] = [
        ("text_prefill", text + kept, "longest prompts fill a forward"),
        ("sampling", work.sampling(settings.max_batch_size) + kept,
         f"{settings.max_batch_size} rows with top_k=0"),
    ]  # fmt: skip
    if rule is not None and vision_load.units_per_image:
        # An image is never cut: a chunk grows to hold the longest one.
        image = vision_load.tokens_per_request // max(1, vision_load.images_per_request)
        tokens = max(prompt, image)
        forward = Prefill(
            tokens=tokens, context=context, units=met.now, sequences=sequences, next_units=met.next
        )
        note = f"{met.now} {plural(met.now, rule.unit_name)} in one forward"
        if met.next:
            note += f", the pixels of {met.next} for the next"
        cases.append(("vision_forward", work.prefill(forward), note))
    share = constants.live_fragmentation[segments(settings)]
    fragmented = [max(int(size * share), constants.segment) for _, size, _ in cases]
    sizes = [
        round_up(case[1] + gap, constants.page) for case, gap in zip(cases, fragmented, strict=True)
    ]
    return transients(
        [(name, size, "estimate", note) for (name, _, note), size in zip(cases, sizes, strict=True)]
    )


def cache_term(region: int, ratio: float, settings: Settings) -> Term:
    """The cache as one allocation."""
    note = f"{ratio:.3f} of free memory less the runtime's reserve"
    if settings.num_gpu_blocks:
        note = f"num_gpu_blocks {settings.num_gpu_blocks}"
    return term("kv_cache", "cache", region, "formula", note)


def state_term(region: int, settings: Settings) -> Term:
    """The states of gated delta nets as one allocation, which no ratio sizes."""
    note = f"{state_slots(settings)} slots: one a sequence of max_batch_size, and two"
    return term("state_cache", "cache", region, "formula", note)
