"""What proposes tokens to a model in speculative decoding."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from turbofit.core.messages import option_of
from turbofit.core.model import TextDims
from turbofit.core.struct import Struct, doc

#: LMDeploy's ``--speculative-algorithm``.
SpeculativeAlgorithm = Literal[
    "eagle", "eagle3", "deepseek_mtp", "hy3_mtp", "qwen3_5_mtp", "dflash"
]
#: LMDeploy's options for a draft, as a request names them: the algorithm comes first.
DRAFT_OPTIONS: Final = (
    "speculative_algorithm", "speculative_draft_model", "speculative_num_draft_tokens",
)  # fmt: skip


class Draft(Struct):
    """A draft beside its target; the first three fields are LMDeploy's ``SpeculativeConfig``.

    ``text`` has the dimensions of the draft's own layers.
    """

    method: SpeculativeAlgorithm
    num_speculative_tokens: Annotated[int, doc("Tokens that it proposes in a step.")] = 1
    model: Annotated[str, doc("Its checkpoint; empty where the target's own has it.")] = ""
    text: TextDims
    vocab: Annotated[int, doc("Tokens among which it chooses.")]
    embeddings: Annotated[bool, doc("Whether it keeps a table of embeddings of its own.")]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a sequence that the target verifies in one step: the last one and these."""
        return self.num_speculative_tokens + 1

    @property
    def has_checkpoint(self) -> bool:
        """Whether it has a checkpoint of its own: it is whole on an engine's first rank."""
        return self.method in ("eagle", "eagle3")

    @property
    def target_states(self) -> int:
        """Hidden states of the target, side by side, that enter it for a token."""
        return 3 if self.method == "eagle3" else 1

    @property
    def given(self) -> dict[str, str | int]:
        """What asks for it, by the names of a plan's request."""
        named = {"speculative_draft_model": self.model} if self.model else {}
        return {
            "speculative_algorithm": self.method,
            **named,
            "speculative_num_draft_tokens": self.num_speculative_tokens,
        }

    @property
    def options(self) -> tuple[str, ...]:
        """LMDeploy's options for it."""
        pairs = ((option_of(name), str(value)) for name, value in self.given.items())
        return tuple(word for pair in pairs for word in pair)
