"""EVA-CLIP, the tower of CogVLM, CogVLM2 and GLM-4V: an image is squeezed into one square.

The preprocessor is the checkpoints' own code; LMDeploy 0.18 has a copy in `vl/model/cogvlm.py`
and `glm4_v.py`. A begin and an end token of the tower's own are part of an image.
"""

from __future__ import annotations

from typing import Literal

from turbofit.core.images import TileRule
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import attention_heads

__all__ = ["read_eva_clip", "square_rule"]


def read_eva_clip(
    section: Section, kind: Literal["eva_clip", "eva_clip_glm"], *, merge: int, projector: int
) -> VisionDims:
    """The tower; ``projector`` is the width of the gated MLP behind it.

    Raises:
        UsageError: dims that contradict each other; the remote code has no defaults for them.
    """
    hidden = section.integer("hidden_size")
    heads = attention_heads(section, "num_heads", hidden)
    size, patch = section.integer("image_size", high=1 << 14), section.integer("patch_size")
    if size % patch or (size // patch) % merge:
        raise section.error("image_size", f"{size} is not whole windows of {patch} x {merge}")
    positions = (size // patch) ** 2 + 1
    if section.integer("num_positions") != positions:
        raise section.error("num_positions", f"is not the {positions} of the image's patches")
    return VisionDims(
        kind=kind,
        layers=section.integer("num_hidden_layers", high=1 << 10),
        hidden=hidden,
        heads=heads,
        intermediate=section.integer("intermediate_size", high=1 << 20),
        patch_size=patch,
        image_size=size,
        channels=section.integer("in_channels", 3, high=64),
        merge=merge,
        projector=projector,
    )


def square_rule(vision: VisionDims) -> TileRule:
    """One tile, whatever the image's shape: its windows, and the two tokens around them."""
    size = vision.image_size or 0
    return TileRule.square(size, (size // vision.patch_size // vision.merge) ** 2 + 2)
