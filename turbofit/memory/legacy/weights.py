"""The language model's weights on one rank of an older TurboMind."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.model import Model
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.generations import Generation
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import weight_classes

__all__ = ["legacy_weight_classes", "older_layouts"]

#: Layouts of packed weights that depend on the card came with 0.18: the plain one everywhere.
_PLAIN: Final = (8, 0)


def older_layouts(constants: EngineConstants, generation: Generation) -> EngineConstants:
    """A generation's paddings of feed-forward networks and experts, on every card the same.

    Over at tp 1 since 0.14, where nothing is padded: by less than 32 channels. Hopper's own layout
    of 4 bits is 0.18's: the binary of 0.17.0 has no plan for it.
    """
    align, int4 = generation.ffn_align or 1, constants.packed["int4"]
    plain = replace(int4["90"], group=int4["default"].group, of=None, fused_silu=False, align=None)
    return replace(
        constants,
        packed={**constants.packed, "int4": {**int4, "90": plain}},
        ffn_align_16bit=align,
        ffn_align_grouped=align,
        experts={card: replace(held, align=align) for card, held in constants.experts.items()},
    )


def legacy_weight_classes(
    model: Model, tp: int, constants: EngineConstants, generation: Generation
) -> dict[str, int]:
    """Bytes per rank of each tensor class, the vision tower apart.

    Embedding and lm_head were whole on every rank before 0.6, their rows padded to ``tp``.
    """
    older = older_layouts(constants, generation)
    classes = weight_classes(replace(model, vision=None), tp, older, _PLAIN)
    if generation.embeddings == "replicated":
        whole = round_up(model.text.vocab, tp) * model.text.hidden * HALF
        classes |= {"embedding": whole, "lm_head": whole}
    return classes
