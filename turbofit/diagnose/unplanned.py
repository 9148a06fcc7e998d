"""Models that people run and turbofit has no account of: their size, and where it is published.

Only enough to say on how many cards their weights fit at 16 bits.
"""

from __future__ import annotations

import re
from typing import Final

from turbofit.core.struct import Struct

__all__ = ["Unplanned", "find_unplanned"]


class Unplanned(Struct):
    """``pattern`` matches names in lower case; ``engine`` says what runs the model."""

    name: str
    pattern: str
    parameters: int
    engine: str
    source: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights at 16 bits."""
        return 2 * self.parameters


_HF: Final = "Hugging Face Transformers"
_PYTORCH: Final = "LMDeploy's PyTorch engine (as the -hf checkpoint)"
_META: Final = "counted on the meta device of Transformers"
_CARD: Final = "its page on the hub, rounded"

_KNOWN: Final = (
    Unplanned(name="LLaVA-1.5-7B", pattern=r"llava-?v?1[.-]5-7b|llava-1\.5-7b|llava-7b",
              parameters=7_063_427_072, engine=_PYTORCH, source=_META),
    Unplanned(name="LLaVA-1.5-13B", pattern=r"llava-?v?1[.-]5-13b",
              parameters=13_400_000_000, engine=_PYTORCH, source=_CARD),
    Unplanned(name="LLaVA-OneVision-7B", pattern=r"llava-?onevision.*7b",
              parameters=8_030_000_000, engine=_HF, source=_CARD),
    Unplanned(name="CogVLM-17B", pattern=r"cogvlm(?!2)",
              parameters=17_600_000_000, engine=_PYTORCH, source=_CARD),
    Unplanned(name="CogVLM2-19B", pattern=r"cogvlm2",
              parameters=19_500_000_000, engine=_PYTORCH, source=_CARD),
    Unplanned(name="Llama-3.2-11B-Vision", pattern=r"llama-?3[.-]2-11b-vision",
              parameters=10_670_220_835, engine=_HF, source=_META),
)  # fmt: skip


def find_unplanned(name: str) -> Unplanned | None:
    """The entry that a name in a log means, or None."""
    plain = name.lower().replace("_", "-")
    return next((one for one in _KNOWN if re.search(one.pattern, plain)), None)
