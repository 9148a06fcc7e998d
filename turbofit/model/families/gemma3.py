"""Gemma 3: an image is resized to one square for SigLIP, and pooled to a fixed token count.

Pan and scan adds crops of long images. LMDeploy's front end does not use it, and Transformers does
not by default; a preprocessor config that enables pan and scan is refused.
"""

from __future__ import annotations

from math import isqrt
from typing import Final

from msgspec.structs import replace

from turbofit.core.images import TileRule
from turbofit.model.families.dims import CheckpointConfig, Dims, read_tower, tied_text

_TOWER: Final = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
    "intermediate_size": 3072, "patch_size": 16, "image_size": 224, "num_channels": 3,
}  # fmt: skip


def read(parts: CheckpointConfig) -> Dims:
    """Read a Gemma3ForConditionalGeneration; missing keys take Transformers' defaults."""
    config = parts.config
    text = tied_text(config, "Gemma3ForCausalLM", default=True)
    parts.images.refuse_if(
        parts.images.boolean("do_pan_and_scan", False),
        "do_pan_and_scan",
        "is true, and LMDeploy's front end never does so",
    )
    section = config.part("vision_config")
    section.refuse_if(
        section.boolean("vision_use_head", False),
        "vision_use_head",
        "is true: turbofit has no account of a pooling head",
    )
    vision = read_tower(section, _TOWER, kind="gemma3")
    tokens = config.integer("mm_tokens_per_image", 256)
    side = (vision.image_size or 0) // vision.patch_size
    config.refuse_if(
        not side or isqrt(tokens) ** 2 != tokens or side % isqrt(tokens),
        "mm_tokens_per_image",
        f"{tokens} does not pool {side} x {side} patches",
    )
    rule = TileRule.square(vision.image_size or 0, tokens)
    return Dims(text, replace(vision, merge=side // isqrt(tokens)), rule)
