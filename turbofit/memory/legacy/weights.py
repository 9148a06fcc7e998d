"""The language model's weights on one rank of an older TurboMind."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.model import Model
from turbofit.core.units import HALF, round_up
from turbofit.memory.legacy.generations import Generation
from turbofit.memory.turbomind.constants import EngineConstants
from turbofit.memory.turbomind.weights import weight_classes

__all__ = ["legacy_weight_classes"]

#: Layouts of packed weights that depend on the card came with 0.18: the plain one everywhere.
_PLAIN: Final = (8, 0)


def legacy_weight_classes(
    model: Model, tp: int, constants: EngineConstants, generation: Generation
) -> dict[str, int]:
    """Bytes per rank of each tensor class, the vision tower apart.

    Embedding and lm_head were whole on every rank before 0.6, their rows padded to ``tp``.
    """
    classes = weight_classes(replace(model, vision=None), tp, constants, _PLAIN)
    if generation.embeddings == "replicated":
        whole = round_up(model.text.vocab, tp) * model.text.hidden * HALF
        classes |= {"embedding": whole, "lm_head": whole}
    return classes
