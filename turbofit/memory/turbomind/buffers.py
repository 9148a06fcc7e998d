"""Device and host buffers that live as long as the engine, allocated after the cache.

Each line is one constructor's buffer in LMDeploy 0.18 (language_model, unified_attention_layer,
generation, sampling, guided_decoding, moe_ffn_layer, gemm workspace), in bytes per rank. ``phases``
is 2 while ``async_`` is on: buffers that a running step uses exist twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import Model, MoeDims
from turbofit.core.plan import Settings
from turbofit.core.units import round_up
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.pool import forward_tokens, symmetric_buffer
from turbofit.memory.turbomind.weights import lm_head_rows

__all__ = ["device_buffers", "pinned_buffers"]

_INT = 4
_POINTER = 8
_CURAND_STATE = 48
_ROUTING_TILES = 16
_WORDS = 2 * 2 * 32 + 48  # stop and bad words (32 ids and offsets each), end ids, penalties


def device_buffers(
    model: Model, settings: Settings, constants: EngineConstants, l2: int
) -> Iterator[tuple[str, int, str]]:
    """Persistent device buffers of one rank: (term, bytes, note).

    Args:
        model: the checkpoint.
        settings: the engine's options.
        constants: the generation's figures.
        l2: the card's L2 cache, which the GEMM tuner flushes through a buffer of that size.
    """
    text, batch = model.text, settings.max_batch_size
    phases = _phases(settings)
    forward = forward_tokens(settings)
    heads = text.heads // settings.tp
    tokens = constants.attention_workspace_tokens
    yield (
        "attention_workspace",
        tokens * heads * (text.head_dim + 2) * _INT + tokens * _INT,
        "split-k partial outputs of decoding",
    )
    yield (
        "block_pointers",
        phases * (_block_slots(settings) + 16) * _POINTER,
        "max_batch_size × session_len / cache_block_seq_len pointers",
    )
    yield "token_ids", batch * settings.session_len * _INT, "max_batch_size × session_len"
    yield (
        "sampling_buffers",
        phases * batch * constants.max_log_probs * (_INT + _INT),
        "log probabilities and their indices",
    )
    bitmask = -(-lm_head_rows(text, settings.tp) // 32) * _INT
    yield "guided_decoding", phases * batch * bitmask, "one bit a vocabulary entry and row"
    if settings.tp > 1:
        yield (
            "symmetric_buffer",
            round_up(symmetric_buffer(text, settings), constants.pool_granularity),
            "all-reduce buffer; also holds the hidden states",
        )
    if constants.gemm_workspace:
        yield "gemm_workspace", sum(constants.gemm_workspace), "barriers, partials, tensor maps"
    yield "l2_flush", l2, "the GEMM tuner's cache flush, never freed"
    if text.moe is not None:
        yield "expert_routing", _routing(text.moe, forward), "which token goes to which expert"
    small = batch * (_CURAND_STATE + phases * (6 * _INT + _POINTER + _WORDS * _INT))
    small += forward * (1 + phases * 2 * _INT)
    if text.delta is not None:
        small += phases * batch * (text.delta.layers + 1) * _POINTER  # a sequence's states
    if model.mrope:
        small += phases * forward * 3 * _INT  # M-RoPE positions
    yield "small_buffers", small, "token ids, lengths, stop words, masks, positions"


def _routing(moe: MoeDims, tokens: int) -> int:
    """MoeFfnDefaultImpl::Init: a mask an expert, four arrays of routed tokens, and counters."""
    counters = moe.experts * (_ROUTING_TILES + 1) + 1
    return (moe.experts * tokens + 4 * moe.experts_per_token * tokens + counters) * _INT


def pinned_buffers(model: Model, settings: Settings) -> int:
    """Pinned host bytes of one rank that exist from the start."""
    batch, phases = settings.max_batch_size, _phases(settings)
    embeds = phases * forward_tokens(settings) * model.text.hidden * 2
    token_ids = batch * settings.session_len * _INT
    logprobs = batch * 1024 * (_INT + _INT)
    pointers = _block_slots(settings) * _POINTER
    bitmask = batch * -(-lm_head_rows(model.text, settings.tp) // 32) * _INT
    small = batch * (_CURAND_STATE + _WORDS * _INT) + forward_tokens(settings) * 2 * _INT
    return embeds + token_ids + logprobs + pointers + bitmask + small


def _phases(settings: Settings) -> int:
    return 2 if settings.async_ else 1


def _block_slots(settings: Settings) -> int:
    return settings.max_batch_size * -(-settings.session_len // settings.cache_block_seq_len)
