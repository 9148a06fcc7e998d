"""What speculative decoding takes of the PyTorch engine besides.

The draft's weights, its blocks beside the target's (`cache.block_bytes`), further states of delta
nets (`cache.state_bytes`), more tokens in each decoding step, and CUDA graphs of its own.
Source: LMDeploy pytorch/spec_decode, strategies/ar_spec, backends/cuda/graph_runner.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from turbofit.core.draft import Draft
from turbofit.core.machine import Gpu
from turbofit.core.model import Model
from turbofit.core.plan import Settings, Term
from turbofit.core.struct import known
from turbofit.core.units import HALF, round_up
from turbofit.memory.pytorch.activations import Activations, Prefill
from turbofit.memory.pytorch.constants import PytorchConstants
from turbofit.memory.pytorch.flash_attention import splits
from turbofit.memory.pytorch.minicpm3 import MiniCPM3Activations
from turbofit.memory.pytorch.weights import VOCAB_ROWS, weight_classes
from turbofit.memory.shared_terms import term
from turbofit.model.draft_reader import draft_elements, replaced_outputs
from turbofit.model.parameters import Linear, packed_bytes

__all__ = ["DraftedActivations", "activations_of", "draft_staged", "draft_terms"]

#: The target's token of each of Eagle3's, and its word and bit in a grammar's mask, at 64 bits.
_PLACES = 3 * 8
#: FlashAttention-3 keeps the logarithm of a sum at 32 bits.
_SUMS = 2
#: More than any card has multiprocessors, where a card's cannot be read. Over.
_PROCESSORS = 160
_KEPT = 3
#: CUDA graphs of a batch: the target's, and the draft's over a step's tokens and over one.
_GRAPHS = 3


def draft_terms(model: Model, settings: Settings) -> list[Term]:
    """The draft's weights on one rank, and what building it leaves behind.

    One that is whole on the first rank is charged to all of them. Over on the others.
    """
    draft = settings.draft
    if draft is None:
        return []
    note = f"{draft.method}, {draft.num_speculative_tokens} tokens a step"
    if draft.has_checkpoint and settings.tp > 1:
        note += ", on the first rank alone"
    terms = [term("weights.draft", "weights", draft_weights(model, draft, settings.tp),
                  "formula", note)]  # fmt: skip
    if draft.method == "eagle3":
        size = replaced_outputs(draft.text) * draft.text.hidden * HALF
        note = "a projection that it replaces by a wider one; Python's collector frees it. Over"
        terms.append(term("weights.draft_replaced", "weights", size, "formula", note))
    return terms


def draft_weights(model: Model, draft: Draft, tp: int) -> int:
    """Bytes of the draft on one rank."""
    text, layers = draft.text, draft.text.layers
    table = text.vocab * text.hidden * HALF
    if draft.has_checkpoint:
        size = draft_elements(draft.method, text, draft.vocab, model.text.hidden) * HALF
        places = _PLACES * draft.vocab if draft.method == "eagle3" else 0
        return size + places + (table if draft.embeddings else 0)
    source = replace(model.source, sizes="formula")
    held = weight_classes(replace(model, text=text, vision=None, source=source), tp)
    size = sum(held.get(name, 0) for name in ("attention", "mlp", "norms"))
    both = Linear(name="eh_proj", inputs=2 * text.hidden, outputs=text.hidden, count=layers)
    if draft.method == "qwen3_5_mtp":
        return size + both.weights * HALF // tp + 2 * text.hidden * HALF
    # Each layer has embeddings, a head, three norms and a projection of its own.
    joined = both.weights * HALF
    if model.quantization is not None:
        joined = packed_bytes(both, model.quantization)
    rows = round_up(text.vocab, VOCAB_ROWS) // tp
    norms = (3 * layers - 1) * text.hidden * HALF
    return size + norms + joined + layers * (table + rows * text.hidden * HALF)


def draft_staged(settings: Settings) -> int:
    """Bytes beside all weights for a moment: embeddings that the target's then replace."""
    draft = settings.draft
    if draft is None or draft.embeddings or not draft.has_checkpoint:
        return 0
    return draft.text.vocab * draft.text.hidden * HALF


def activations_of(
    model: Model, settings: Settings, constants: PytorchConstants, gpus: Sequence[Gpu]
) -> Activations:
    """The stages of a model, with its draft's where something drafts."""
    if settings.draft is None:
        kind = MiniCPM3Activations if model.text.expands_latent else Activations
        return kind(model, settings, constants)
    processors = max(known(gpu.sm_count, _PROCESSORS) for gpu in gpus)
    return DraftedActivations(model, settings, constants, processors)


class DraftedActivations(Activations):
    """The stages of a target that verifies a draft's tokens, and of the draft after them.

    Args:
        model: the target.
        settings: the engine's options, with a draft.
        constants: the generation's figures.
        processors: multiprocessors of a card.
    """

    graphs = _GRAPHS

    def __init__(
        self, model: Model, settings: Settings, constants: PytorchConstants, processors: int
    ) -> None:
        super().__init__(model, settings, constants)
        assert settings.draft is not None
        self.draft = settings.draft
        tp = 1 if self.draft.has_checkpoint else settings.tp
        drafting = replace(model, text=self.draft.text, vision=None, image_rule=None)
        self.drafting = Activations(drafting, replace(settings, tp=tp), constants)
        for work in (self, self.drafting):
            heads = max(1, work.text.kv_heads // work.tp)
            work.splits = max(work.splits, 0 if work.text.mla else splits(heads, processors))
            work.sums = _SUMS
        #: Bytes of the target's hidden states that the draft takes of a token.
        self.states = self.draft.target_states * model.text.hidden * HALF

    def prefill(self, forward: Prefill) -> int:
        """The target's, or the draft's after it.

        Of a prompt in chunks the states of the one before stay, held by a view of their last row.
        """
        kept = self.states * (2 if self.draft.method == "eagle3" else 1)
        target = super().prefill(forward) + forward.tokens * kept
        return max(target, self._draft_prefill(forward))

    def _draft_prefill(self, forward: Prefill) -> int:
        """States three times: of the chunk before, as they come, and joined to that one's last row.

        With images embeddings go the same way. Exact on pretend GPUs for Eagle3.
        """
        given = self.states
        if self.model.vision is not None:
            given += self.text.hidden * HALF
        text_only = replace(forward, units=0, next_units=0)
        return self.drafting.prefill(text_only) + _KEPT * forward.tokens * given

    def decode(self, rows: int) -> int:
        """A step of so many sequences: the target's over all their tokens, or the draft's."""
        tokens = rows * self.draft.tokens_per_step
        larger = max(super().decode(tokens), self.drafting.decode(tokens))
        return larger + tokens * self.states

    def sampling(self, rows: int) -> int:
        """Logits of so many sequences: all rows verified, the last of each sampled.

        Or those before it: laid out alone, at 32 bits, and their probabilities, likewise.
        """
        count, vocab = self.draft.num_speculative_tokens, self.text.vocab
        tokens = rows * self.draft.tokens_per_step
        verified = tokens * (vocab * HALF + self.states + self.text.hidden * HALF)
        rejected = rows * vocab * count * (HALF + 4 * HALF) + self.constants.sampling_base
        return verified + max(super().sampling(rows), rejected)

    def graph_buffers(self, captured: Sequence[int]) -> int:
        """What graphs hold besides: outputs of the target, inputs and outputs of the draft."""
        hidden, drafted = self.text.hidden * HALF, self.draft.text.hidden * HALF
        each = hidden + 2 * self.states + 2 * drafted
        tokens = sum(captured) * (self.draft.tokens_per_step * each + 3 * drafted)
        return round_up(tokens, self.constants.page)

    def further_pool(self) -> int:
        """Bytes of the pool of the draft's graphs, and what picking experts' kernels leaves."""
        page, batch = self.constants.page, self.settings.max_batch_size
        step = self.drafting.decode(batch * self.draft.tokens_per_step)
        picked = self.constants.segment if self.draft.text.moe else 0
        return picked + max(self.constants.segment, round_up(step, page) + page)
