"""The stages of MiniCPM3: latents that are expanded before they are cached, logits of every token.

Its class applies the head inside its forward, to all tokens of a prefill and not to the last row of
each sequence. Counted in LMDeploy's models/minicpm3.py and checked on pretend GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from turbofit.core.units import HALF
from turbofit.memory.pytorch.activations import Activations, Prefill

__all__ = ["MiniCPM3Activations"]

#: Of each head: queries as projected, then queries, keys and padded values laid out, the output.
_LAID_OUT = 5
#: Hidden states of a token in attention: the scaled embeddings, what the layer before gave and its
#: residual, and their norm.
_COPIES = 4
#: The same beside the logits: from the last norm, and scaled.
_HEAD_COPIES = 2


class MiniCPM3Activations(Activations):
    """The stages of a model whose forward ends in logits."""

    def prefill(self, forward: Prefill) -> int:
        """The largest stage, beside the logits of the forward before.

        Of a prompt in chunks these stay, held by a view of their last row. Over for the first.
        """
        logits = forward.tokens * self._head_elements() * HALF + self.constants.prefill_base
        before = forward.tokens * self.text.vocab * HALF
        return max(super().prefill(forward), logits) + before

    def decode(self, rows: int) -> int:
        """One decoding step: a layer's, or its logits."""
        return max(super().decode(rows), rows * self._head_elements() * HALF)

    def graph_buffers(self, captured: Sequence[int]) -> int:
        """The logits that each CUDA graph ends in; the largest one's are in the graphs' pool."""
        return (sum(captured) - max(captured)) * self.text.vocab * HALF

    def _head_elements(self) -> int:
        copies = _HEAD_COPIES * self.text.hidden
        return self.text.vocab + copies + self.constants.token_elements

    def _attention_elements(self) -> int:
        mla, text = self.text.mla, self.text
        assert mla is not None
        each = mla.nope_dim + mla.v_dim + _LAID_OUT * mla.key_dim
        alive = _COPIES * text.hidden + mla.kv_rank + mla.rope_dim + self._token_elements()
        return alive + text.heads * each
