"""What TurboMind allocates after its cache, in its own order.

Seen in the 0.18.0 binary on pretend GPUs: constructors' buffers in the rank's pool, then the GEMM
workspace, then forwards in the executor's pool. `memory.turbomind` sums the same tensors up for a
plan; here their order matters, since a log shows at which of them an engine died.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from turbofit.core.units import HALF, round_up
from turbofit.diagnose.rules.replay import PoolOperation
from turbofit.memory.turbomind.weights import vision_mlp_width, vision_side, vision_tp

if TYPE_CHECKING:
    from turbofit.core.model import Model, VisionDims
    from turbofit.core.plan import Settings
    from turbofit.memory.turbomind.pool import Forward, PoolModel
    from turbofit.memory.turbomind.weights import EngineConstants

RANK: Final = "rank"
WEIGHTS: Final = "weights"
EXECUTOR: Final = "executor"
ENGINE: Final = "engine thread"

_SMALL: Final = 512
_RNG: Final = 196_608


def rank_buffers(
    model: Model, settings: Settings, pool: PoolModel, constants: EngineConstants
) -> Iterator[PoolOperation]:
    """The rank's pool after the cache, each buffer in whole 512 bytes."""
    batch, phases = settings.max_batch_size, 2 if settings.async_ else 1
    patches = model.mrope
    for what, size in _rank_sizes(settings, pool, constants, phases, patches=patches):
        yield PoolOperation("" if what == "random numbers" else RANK, round_up(size, _SMALL), what)
    if model.vision is not None:
        rows = 12 * pool.forward_tokens if patches else 4 * (pool.forward_tokens + 1)
        for _ in range(phases):
            for size in (4 * batch,) * 3 if patches else ():
                yield PoolOperation(RANK, round_up(size, _SMALL), "vision buffers")
            yield PoolOperation(RANK, round_up(rows, _SMALL), "vision buffers")
            if not patches:
                yield PoolOperation(RANK, round_up(pool.forward_tokens, _SMALL), "vision buffers")


def _rank_sizes(
    settings: Settings, pool: PoolModel, constants: EngineConstants, phases: int, *, patches: bool
) -> Iterator[tuple[str, int]]:
    batch, forward = settings.max_batch_size, pool.forward_tokens
    row = 4 * batch
    yield from (("batch state", batch),) * 5
    yield from (("batch state", row),) * 7
    for _ in range(phases):
        yield from (("input", 4 * forward), ("input", row + 4), ("input", row))
    yield "random numbers", _RNG
    if patches:
        yield "positions", row
    slots = batch * -(-settings.session_len // settings.cache_block_seq_len)
    for _ in range(phases):
        yield from (("block pointers", (slots + 16) * 8), ("block pointers", row + 4))
    tokens = constants.attention_workspace_tokens
    head = tokens * pool.local_heads * 4
    yield "attention workspace", head * pool.text.head_dim
    yield from (("attention workspace", head * 2), ("attention workspace", tokens * 4))
    for _ in range(phases):
        yield from (("logits", row),) * 3
        yield from (("logits", 256 * batch), ("logits", 128 * batch))
    for _ in range(phases):
        yield from (("sampling", row),) * 4
        yield from (("sampling", 4 * constants.max_log_probs * batch),) * 2
        yield "sampling", row
    for _ in range(phases):
        yield from (("stop words", 256 * batch), ("stop words", row))
    for _ in range(phases):
        yield "guided decoding", batch * -(-pool.vocab_padded // 32) * 4
    yield "generation", 48 * batch
    yield "token ids", row * settings.session_len
    yield "generation", row
    for _ in range(phases):
        yield from (("generation", size) for size in (2 * row, batch, row, 2 * row, row))
    yield "token mask", forward


def start_ops(
    model: Model,
    settings: Settings,
    pool: PoolModel,
    constants: EngineConstants,
    region: int,
) -> Iterator[PoolOperation]:
    """From the cache's region to the workspace of the executor's thread."""
    yield PoolOperation(RANK, region, "cache")
    yield from rank_buffers(model, settings, pool, constants)
    if settings.tp > 1:
        yield PoolOperation("", pool.symm, "symmetric buffer")
    yield PoolOperation(WEIGHTS, 0, "trim")
    for size in (*constants.gemm_workspace, _SMALL):
        yield PoolOperation(WEIGHTS, size, "GEMM workspace")


def first_forward_ops(l2: int) -> Iterator[PoolOperation]:
    """The first forward makes the executor's pool, and the GEMM tuner's buffer for flushing L2."""
    yield PoolOperation(EXECUTOR, _SMALL, "the first step")
    yield PoolOperation("", l2, "the L2 flush buffer")
    yield PoolOperation(EXECUTOR, -_SMALL, "the first step")


def forward_ops(pool: PoolModel, forward: Forward) -> Iterator[PoolOperation]:
    """The executor's pool through one forward pass: vision, then decoder."""
    yield PoolOperation(EXECUTOR, _SMALL, "step")
    model, units, embeds = pool.model, forward.units, 0
    if units and model.vision is not None:
        embeds = model.features(units) * pool.text.hidden * HALF
        encode = _internvit if model.vision.kind == "internvit" else _qwenvit
        yield from encode(pool, model.vision, units)
    yield from _decoder(pool, forward)
    yield PoolOperation(EXECUTOR, -embeds - _SMALL, "step")


def _decoder(pool: PoolModel, forward: Forward) -> Iterator[PoolOperation]:
    """One layer: all are alike. Experts are not followed."""
    text, tokens = pool.text, forward.tokens
    stream, head = tokens * text.hidden * HALF, text.head_dim * HALF
    streams = 2 if pool.tp == 1 else 1
    for _ in range(streams):
        yield PoolOperation(EXECUTOR, stream, "hidden states")
    attention = (
        tokens * (pool.local_heads + 2 * pool.local_kv) * head,
        tokens * pool.local_heads * head,
        2 * pool.local_kv * (forward.context + pool.constants.kv_flatten_pad_tokens) * head,
    )
    for size in attention:
        yield PoolOperation(EXECUTOR, size, "attention")
    yield PoolOperation(EXECUTOR, -sum(attention), "attention")
    mlp = tokens * pool.ffn * 2 * HALF
    yield PoolOperation(EXECUTOR, mlp, "MLP")
    yield PoolOperation(EXECUTOR, -mlp - streams * stream, "MLP")


def _internvit(pool: PoolModel, vision: VisionDims, tiles: int) -> Iterator[PoolOperation]:
    """Micro-batches of what the symmetric buffer holds; on one GPU all tiles at once."""
    text, side, out = pool.text, vision_side(vision), pool.model.features(1)
    yield PoolOperation(EXECUTOR, tiles * out * text.hidden * HALF, "image features")
    chunk = tiles
    if pool.tp > 1:
        row = max((side * side + 1) * vision.hidden, out * text.hidden)
        chunk = min(tiles, max(1, pool.symm // HALF // row))
    streams, ranks = (2 if pool.tp == 1 else 1), vision_tp(vision, pool.tp)
    token = (side * side + 1) * vision.hidden * HALF
    pixels = vision.channels * (side * vision.patch_size) ** 2 * HALF
    patches = side * side * vision.hidden * HALF
    merged = out * vision.hidden * vision.merge**2 * HALF
    inner = out * text.hidden // pool.tp * HALF
    last = out * text.hidden * HALF
    mlp = (side * side + 1) * vision_mlp_width(vision, pool.tp) // pool.tp * HALF
    stages: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("vision patches", (pixels, pixels, patches, token, -2 * pixels - patches)),
        ("vision hidden states", (token,) * (streams - 1)),
        ("vision attention", _and_back(3 * token // ranks, 2 * token // ranks, token // ranks)),
        ("vision MLP", _and_back(mlp)),
        ("projector", _and_back(merged, merged, inner, *(last,) * (streams - 1))),
        ("vision hidden states", (-token * streams,)),
    )
    while tiles > 0:
        now = min(chunk, tiles)
        for what, sizes in stages:
            for size in sizes:
                yield PoolOperation(EXECUTOR, now * size, what)
        tiles -= now


def _qwenvit(pool: PoolModel, vision: VisionDims, patches: int) -> Iterator[PoolOperation]:
    """All patches at once. With several GPUs the symmetric buffer takes one stream, if it can."""
    # The engine's own thread prepares the next step while this one runs: offsets, 4 bytes a patch.
    yield PoolOperation(ENGINE, 2 * (4 * patches + 4 * _SMALL), "vision positions")
    head_dim = pool.constants.vision_head_dims.get(vision.head_dim, vision.head_dim)
    width = vision.heads * head_dim // vision_tp(vision, pool.tp) * HALF
    hidden, merged = vision.hidden * HALF, vision.merge**2
    in_symm = pool.tp > 1 and patches * hidden <= pool.symm
    rotary = vision.head_dim * HALF
    pixel = vision.channels * vision.temporal_patch * vision.patch_size**2 * HALF
    mlp = vision_mlp_width(vision, pool.tp) // pool.tp * HALF
    inner = hidden * merged // pool.tp // merged
    out = pool.text.hidden * HALF
    stages: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("vision positions", (rotary,)),
        ("vision patches", (pixel, hidden, -pixel)),
        ("vision hidden states", () if in_symm else (hidden,)),
        ("vision attention", _and_back(3 * width, 2 * width, width)),
        ("vision MLP", _and_back(*(mlp,) * (2 if vision.gated_mlp else 1))),
        ("projector", (inner,)),
    )
    for what, sizes in stages:
        for size in sizes:
            yield PoolOperation(EXECUTOR, patches * size, what)
    features = patches // merged * out
    if not in_symm:
        yield PoolOperation(EXECUTOR, features, "projector")
    yield PoolOperation(EXECUTOR, features, "image features")
    held = rotary + hidden + inner + (0 if in_symm else hidden)
    yield PoolOperation(EXECUTOR, -patches * held - (0 if in_symm else features), "vision")
    yield PoolOperation(ENGINE, -2 * (4 * patches + 4 * _SMALL), "vision positions")


def _and_back(*sizes: int) -> tuple[int, ...]:
    """Allocations that are all given back at the end of their stage."""
    return (*sizes, -sum(sizes))
