"""Older TurboMinds: what one forward takes of the pool, buffers for good, and the cache."""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.model import Model, TextDims
from turbofit.core.plan import Settings
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.generations import CacheRule, Generation, LegacyConstants
from turbofit.memory.shared_terms import PAGE
from turbofit.memory.turbomind.cache import CacheShape, cache_shape, tokens_held
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import kv_heads_held, lm_head_rows

__all__ = ["LegacyCache", "LegacyForward", "legacy_buffers"]

#: Bytes a vocabulary entry and row of sampling with top_k=0: logits, ids, sorting. Upper end.
_SAMPLING = 20

_INT = _FLOAT = 4
_POINTER = 8
_WORDS = 4 * 32 * _INT  # stop and bad words with their offsets
_CURAND_STATE = 48


class LegacyForward:
    """Sizes of forwards, bytes per rank, for one model and cache under one set of settings.

    Args:
        model: the checkpoint.
        settings: the engine's options.
        generation: its rules.
        constants: figures of 0.18 that no generation changed.
        legacy: figures of all older ones.
        held: tokens that the cache holds.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        generation: Generation,
        constants: EngineConstants,
        legacy: LegacyConstants,
        held: int,
    ) -> None:
        self._model, self._settings, self._generation = model, settings, generation
        self._constants, self._legacy = constants, legacy
        self._held = max(1, held)

    @property
    def session_len(self) -> int:
        """The longest sequence, as the engine cuts it to its cache."""
        wanted = self._settings.session_len
        return min(wanted, self._held) if self._generation.cache.truncates_session else wanted

    @property
    def buffer_session(self) -> int:
        """The tokens of a sequence that buffers are made for: uncut where they come first."""
        early = self._generation.cache.after_buffers
        return self._settings.session_len if early else self.session_len

    @property
    def buffer_tokens(self) -> int:
        """Tokens that the persistent buffers of a whole forward are made for.

        Before 0.3 there is no ``max_prefill_token_num``: what stands there, where it is not 0, is
        ``max_context_token_num``.
        """
        settings = self._settings
        if self._generation.forward == "session":
            if self._generation.iteration == "session":
                sessions = self._generation.context_sessions * settings.session_len
                return settings.max_prefill_token_num or sessions
            return settings.session_len
        return self._settings.max_prefill_token_num + self._settings.max_batch_size

    @property
    def tokens(self) -> int:
        """The most tokens that one forward takes: all of its sequences lie in the cache."""
        most = min(self.buffer_tokens, self._held)
        if self._generation.iteration == "session":
            return most
        return min(most, self._settings.max_prefill_token_num)

    @property
    def context(self) -> int:
        """The most tokens that one forward's sequences have together.

        Sequences that share a prefix count it each, up to ``max_context_token_num``: a session.
        """
        shared = self._settings.enable_prefix_caching
        longest = self._settings.session_len if shared else self.session_len
        return max(self.tokens, longest)

    @property
    def warmup_tokens(self) -> int:
        """Tokens of the longest forward of the engine's own warm-up, 0 where it has none."""
        rule, whole = self._generation.warmup, self.buffer_tokens
        if rule == "none":
            return 0
        lengths = self._legacy.tuning_tokens
        if rule != "tuning":
            lengths = (*lengths, whole)
        most = min(whole, self.session_len) if rule == "requests" else whole
        return max((n for n in lengths if n <= most), default=0)

    def pool(self, tokens: int, context: int) -> int:
        """The pool after a forward of so many tokens over so long contexts, one row sampled."""
        if tokens == 0:
            return 0
        text, tp = self._model.text, self._settings.tp
        heads = text.heads // tp
        kv = kv_heads_held(text.kv_heads, tp) // tp
        flat = 2 * kv * (context + self._constants.kv_flatten_pad_tokens)
        attention = (tokens * (2 * heads + 2 * kv) + flat) * text.head_dim * HALF
        ffn = tokens * self._feed_forward() * HALF
        sampling = _SAMPLING * lm_head_rows(text, tp)
        if self._generation.pool.aliased:
            size = max(attention, ffn) + tokens * text.hidden * HALF + sampling
        else:
            size = attention + ffn + sampling
        return round_up(size, PAGE)

    def sampling(self, rows: int) -> int:
        """Beyond one row: what a batch of so many rows takes to sample, never under."""
        return _SAMPLING * (rows - 1) * lm_head_rows(self._model.text, self._settings.tp)

    def decoding(self, rows: int) -> int:
        """The split workspace of decoding that grows with the batch, where it does."""
        text = self._model.text
        splits = self._generation.buffers.split_rows
        return rows * splits * (text.heads // self._settings.tp) * (text.head_dim + 2) * 4

    def _feed_forward(self) -> int:
        """Elements a token of gate and up together; experts count once for each chosen one."""
        text, tp = self._model.text, self._settings.tp
        dense = 2 * text.intermediate // tp
        if text.moe is None:
            return dense
        moe = text.moe
        routed = moe.experts_per_token * (2 * moe.intermediate // tp + text.hidden)
        return max(dense, routed + 2 * moe.shared_intermediate // tp)


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


class LegacyCache:
    """One rank's cache under one set of settings; sizes in bytes.

    Args:
        text: the language model.
        settings: the engine's options; ``cache_max_entry_count`` of 1 or more counts blocks.
        generation: its rules.
        constants: the figures of pages and slabs.
        total: what ``cudaMemGetInfo`` calls total, for the generations that take a ratio of it.
    """

    def __init__(
        self,
        text: TextDims,
        settings: Settings,
        generation: Generation,
        constants: EngineConstants,
        total: int,
    ) -> None:
        self._rule, self._constants, self._total = generation.cache, constants, total
        self._batch = settings.max_batch_size
        if self._rule.objects:
            self.shape = cache_shape(text, settings, constants)
            return
        tokens = settings.session_len if self._rule.of == "slots" else settings.cache_block_seq_len
        block = _token_bytes(text, settings, self._rule) * tokens
        self.shape = CacheShape(
            block_bytes=block, block_tokens=tokens, slab_bytes=block, blocks_per_slab=1
        )

    def region(self, free: int, ratio: float) -> int:
        """Bytes that the cache takes of what is free; ``ratio`` of 1 or more is a count."""
        if self._rule.objects:
            return int(max(0, free) * ratio)
        return self.blocks(free, ratio) * self.shape.block_bytes

    def blocks(self, free: int, ratio: float) -> int:
        """Blocks, or sessions, of the cache.

        Sessions are taken one by one as requests come: as many as the batch has, no more than
        the entries.
        """
        if self._rule.of == "slots":
            entries = int(ratio) if ratio >= 1 else int(self._rule.default)
            return min(entries, self._batch)
        if ratio >= 1:
            return int(ratio)
        base = self._total if self._rule.of == "total" else max(0, free)
        return int(base * ratio) // self.shape.block_bytes

    def tokens(self, region: int) -> int:
        """Tokens that a region holds."""
        if self._rule.objects:
            return tokens_held(region, self.shape, self._constants)
        return region // self.shape.block_bytes * self.shape.block_tokens


def _token_bytes(text: TextDims, settings: Settings, rule: CacheRule) -> int:
    """Bytes of one token's keys and values on one rank."""
    bits = rule.bits.get(settings.quant_policy, 16)
    extra = 4 if bits < 16 and rule.online_scales else 0
    heads = kv_heads_held(text.kv_heads, settings.tp) // settings.tp
    return text.layers * heads * 2 * (bits * text.head_dim // 8 + extra)
