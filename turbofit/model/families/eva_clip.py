"""EVA-CLIP, the tower of CogVLM, CogVLM2 and GLM-4V: an image is resized to one square.

The preprocessor is code of the checkpoints; LMDeploy has a copy in `vl/model/cogvlm.py` and
`glm4_v.py`. An image has two tokens besides its patches: the tower's begin and end token. In
CogVLM, image tokens pass separate linear layers in every layer.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec.structs import replace

from turbofit.core.images import TileRule
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, read_tower, whole_windows
from turbofit.model.families.text import read_text

_TOWER: Final = {
    **dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "num_heads", "intermediate_size", "patch_size",
         "image_size")
    ),
    "in_channels": 3,
}  # fmt: skip
#: The number of positions in the first CogVLM's tower, by which LMDeploy knows that no convolution
#: follows the tower.
_FIRST_POSITIONS: Final = 1226


def read_eva_clip(
    section: Section, kind: Literal["eva_clip", "eva_clip_glm"], *, merge: int, projector: int
) -> VisionDims:
    """Read the tower; ``projector`` is the width of the gated MLP after the tower.

    Raises:
        UsageError: sizes of the tower contradict each other.
    """
    tower = read_tower(section, _TOWER, kind=kind, merge=merge, projector=projector)
    vision = whole_windows(section, tower)
    positions = ((vision.image_size or 0) // vision.patch_size) ** 2 + 1
    section.refuse_if(
        section.integer("num_positions") != positions,
        "num_positions",
        f"is not {positions}, one more than the image has patches",
    )
    return vision


def square_rule(vision: VisionDims) -> TileRule:
    """Return the rule that makes one square tile of every image.

    A tile has a token for each window of patches, and two special tokens.
    """
    size = vision.image_size or 0
    return TileRule.square(size, (size // vision.patch_size // vision.merge) ** 2 + 2)


def read_cogvlm(parts: CheckpointConfig) -> Dims:
    """Read a CogVLMForCausalLM, as its remote code and LMDeploy do."""
    config = parts.config
    text = read_text(config, "CogVLMForCausalLM")
    groups = "num_multi_query_heads"
    kv_heads = config.divisor(groups, text.heads, "heads", text.heads)
    text = replace(
        text, kv_heads=kv_heads, vision_experts=True, vision_expert_bias=groups in config
    )
    section = config.required("vision_config")
    first = section.integer("num_positions") == _FIRST_POSITIONS
    vision = read_eva_clip(
        section, "eva_clip", merge=1 if first else 2, projector=text.intermediate
    )
    return Dims(text, vision, square_rule(vision))
