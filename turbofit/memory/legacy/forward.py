"""What one forward of the language model takes of TurboMind's pool, in the older layouts."""

from __future__ import annotations

from turbofit.core.model import Model
from turbofit.core.plan import Settings
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.generations import Generation, LegacyConstants
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import kv_heads_held, lm_head_rows

__all__ = ["LegacyForward"]

#: Bytes a vocabulary entry and row of sampling with top_k=0: logits, ids, sorting. Upper end.
_SAMPLING = 20


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
        return round_up(size, self._constants.pool_granularity)

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
