"""Device buffers of older TurboMinds that live as long as the engine (LlamaBatch.cc and kin)."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.forward import LegacyForward
from turbofit.memory.legacy.generations import Generation
from turbofit.memory.turbomind.weights import lm_head_rows

__all__ = ["legacy_buffers"]

_INT = _FLOAT = 4
_POINTER = 8
_WORDS = 4 * 32 * _INT  # stop and bad words with their offsets
_CURAND_STATE = 48


def legacy_buffers(
    model: Model,
    settings: Settings,
    generation: Generation,
    forward: LegacyForward,
) -> Iterator[tuple[str, int, str]]:
    """Persistent device buffers of one rank: (term, bytes, note).

    Args:
        model: the checkpoint.
        settings: the engine's options.
        generation: its rules.
        forward: the tokens that buffers are made for.
    """
    text, rule, batch = model.text, generation.buffers, settings.max_batch_size
    tokens, session_len = forward.buffer_tokens, forward.buffer_session
    vocab = round_up(text.vocab, settings.tp)
    heads = text.heads // settings.tp
    yield "hidden_states", rule.hidden * tokens * text.hidden * HALF, f"{tokens} tokens"
    if rule.kv_copies:
        kv = max(1, text.kv_heads // settings.tp) * text.head_dim
        yield "kv_copies", rule.kv_copies * tokens * kv * HALF, "linear keys and values"
    yield (
        "token_ids",
        rule.token_ids * batch * session_len * _INT,
        f"{rule.token_ids} of max_batch_size × session_len",
    )
    symmetric = max(0, batch * lm_head_rows(text, settings.tp) * HALF)
    if rule.logits:
        yield "logits", rule.logits * batch * vocab, "max_batch_size × vocabulary"
    elif settings.tp > 1:  # one buffer serves hidden states and logits
        larger = max(0, symmetric - rule.hidden * tokens * text.hidden * HALF)
        yield "logits", larger, "beyond the hidden states they share a buffer with"
    if rule.log_probs:
        yield "log_probs", 2 * batch * rule.log_probs * _INT, "and their indices"
    if rule.attention_tokens:
        floats = heads * (text.head_dim + rule.attention_extra) + 1
        yield "attention_workspace", rule.attention_tokens * floats * _FLOAT, "split-k outputs"
    pointers = batch * -(-session_len // settings.cache_block_seq_len) * _POINTER
    small = pointers + batch * (_WORDS + 4 * _CURAND_STATE + 2 * text.hidden * HALF)
    small += tokens * _INT
    if model.mrope:
        small += 3 * 3 * batch * session_len * _INT  # M-RoPE positions of three states
    yield "small_buffers", small, "block pointers, stop words, random states, positions"
