"""The named lines of a ledger, in the order in which the PyTorch engine takes the memory."""

from __future__ import annotations

from turbofit.core.machine import Gpu
from turbofit.core.model import Model, TileRule
from turbofit.core.plan import Basis, Phase, Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import round_up
from turbofit.machine.presets import context_bytes
from turbofit.memory.exposure import Exposure
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.cache import state_slots
from turbofit.memory.pytorch.constants import PytorchConstants
from turbofit.memory.pytorch.environment import segments
from turbofit.memory.pytorch.weights import weight_classes

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
_HOPPER = (9, 0)


def before_terms(
    gpu: Gpu, settings: Settings, first: bool, linked: bool, constants: PytorchConstants
) -> list[Term]:
    """What one GPU holds before the weights: others, contexts, the communicator.

    Args:
        gpu: the card.
        settings: the engine's options.
        first: whether it is the group's first GPU, where the front end has a context of its own.
        linked: whether NVLink joins every pair of the group.
        constants: the generation's figures.
    """
    context, note = context_bytes(gpu)
    terms = [
        _term("others", "before", known(gpu.used, 0), "measured", "held by others"),
        _term("cuda_context", "context", context, "estimate", note),
    ]
    if first:
        why = "the HTTP server asks torch about the card; a pipeline has none of it"
        terms.append(_term("frontend_context", "context", context, "estimate", why))
    if settings.tp > 1:
        hopper = gpu.compute_capability != "NA" and gpu.compute_capability >= _HOPPER
        kind = "host" if not linked else "nvlink_hopper" if hopper else "nvlink"
        size, note = constants.nccl_buffers[kind], f"NCCL, {settings.tp} ranks"
        terms.append(_term("communicator", "context", size, "estimate", note))
    return terms


def weight_terms(model: Model, settings: Settings, constants: PytorchConstants) -> list[Term]:
    """The weights of one rank by class, and what loading leaves unusable between them."""
    basis: Basis = "file" if model.source.sizes == "file" else "formula"
    classes = weight_classes(model, settings.tp)
    terms = [_term(f"weights.{name}", "weights", size, basis) for name, size in classes.items()]
    kind = segments(settings)
    lost = constants.load_fragmentation[kind]
    note = f"torch's {kind} segments, filled in part"
    terms.append(_term("load_fragmentation", "weights", lost, "estimate", note))
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
    settings: Settings, gpu: Gpu, most_blocks: int, constants: PytorchConstants
) -> list[Term]:
    """What one GPU holds for good after the cache.

    Args:
        settings: the engine's options.
        gpu: the card.
        most_blocks: KV blocks at most, which every graph has a table of.
        constants: the generation's figures.
    """
    hopper = gpu.compute_capability != "NA" and gpu.compute_capability >= _HOPPER
    workspace = constants.cublas_workspace["hopper" if hopper else "default"]
    size = constants.cublas_workspaces * workspace
    terms = [_term("cublas", "buffers", size, "formula", "workspaces of torch's handles")]
    tables = sum(capture_sizes(settings)) * most_blocks * _INT
    if tables:
        note = "each CUDA graph's table of blocks"
        terms.append(_term("cuda_graphs", "buffers", tables, "formula", note))
    note = "kernels loaded lazily"
    terms.append(_term("kernel_modules", "buffers", constants.kernel_modules, "estimate", note))
    return terms


def pool_term(work: Activations, settings: Settings, constants: PytorchConstants) -> Term:
    """What torch keeps after the warm-up: a prefill of one token a sequence, and the graphs."""
    step = work.decode(settings.max_batch_size)
    graphs = 2 if capture_sizes(settings) else 1
    size = graphs * max(constants.segment, round_up(step, constants.page) + constants.page)
    size += round_up(work.delta_warmup(settings.max_batch_size), constants.page)
    note = "an eager pass and the graphs' own pool"
    return _term("pool_warmup", "buffers", size, "formula", note)


def transient_terms(
    model: Model,
    work: Activations,
    settings: Settings,
    exposure: Exposure,
    units_per_forward: int,
    constants: PytorchConstants,
) -> list[Term]:
    """The most that torch's allocator holds above what stays, in each worst case.

    The largest is marked as the one that decides. Each holds what lies unusable between live
    blocks.
    """
    context = settings.session_len
    prompt = min(settings.max_prefill_token_num, context)
    sequences = settings.max_batch_size
    cases: list[tuple[str, int, str]] = [
        ("text_prefill", work.prefill(Prefill(tokens=prompt, context=context, sequences=sequences)),
         "longest prompts fill a forward"),
        ("sampling", work.sampling(settings.max_batch_size),
         f"{settings.max_batch_size} rows with top_k=0"),
    ]  # fmt: skip
    if exposure.units_per_image:
        # An image is never cut: a chunk grows to hold the longest one.
        image = exposure.tokens_per_request // max(1, exposure.images_per_request)
        tokens = min(max(prompt, image), context)
        name = "tiles" if isinstance(model.image_rule, TileRule) else "patches"
        forward = Prefill(
            tokens=tokens, context=context, units=units_per_forward, sequences=sequences
        )
        cases.append(
            ("vision_forward", work.prefill(forward), f"{units_per_forward} {name} in one forward")
        )
    lost = 1 + constants.live_fragmentation[segments(settings)]
    sizes = [round_up(int(size * lost), constants.page) for _, size, _ in cases]
    decides = sizes.index(max(sizes))
    return [
        Term(
            term=name,
            phase="transient",
            bytes=size,
            basis="estimate",
            note=note,
            worst=index == decides,
        )
        for index, ((name, _, note), size) in enumerate(zip(cases, sizes, strict=True))
    ]


def cache_term(region: int, ratio: float, settings: Settings) -> Term:
    """The cache as one allocation."""
    note = f"{ratio:.3f} of free memory less the runtime's reserve"
    if settings.num_gpu_blocks:
        note = f"num_gpu_blocks {settings.num_gpu_blocks}"
    return _term("kv_cache", "cache", region, "formula", note)


def state_term(region: int, settings: Settings) -> Term:
    """The states of gated delta nets as one allocation, which no ratio sizes."""
    note = f"{state_slots(settings)} slots: one a sequence of max_batch_size, and two"
    return _term("state_cache", "cache", region, "formula", note)


def _term(term: str, phase: Phase, size: int, basis: Basis, note: str = "") -> Term:
    return Term(term=term, phase=phase, bytes=size, basis=basis, note=note)
