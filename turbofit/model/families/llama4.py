"""Llama 4: experts in all layers or in every second one; images become grids of tiles."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.images import CanvasRule
from turbofit.core.model import MoeDims, TextDims, VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import (
    CheckpointConfig,
    Dims,
    read_tower,
    tied_text,
    whole_windows,
)

_TOWER: Final = {
    "num_hidden_layers": 34, "hidden_size": 768, "num_attention_heads": 16,
    "intermediate_size": 5632, "patch_size": 14, "image_size": 448, "num_channels": 3,
}  # fmt: skip
_TILES: Final = 16
_MOST_TILES: Final = 4096


def read(parts: CheckpointConfig) -> Dims:
    """Read a Llama4ForConditionalGeneration; missing keys take Transformers' defaults."""
    config = parts.config
    text = _text(config)
    vision = _vision(config)
    size = vision.image_size or 0
    images = parts.images
    # A processor without a size makes tiles of 336 pixels.
    images.refuse_if(
        images.part("size").integer("height", 336 if parts.processor else size) != size,
        "size",
        f"is not the tower's {size}",
    )
    images.refuse_if(
        images.boolean("resize_to_max_canvas", False),
        "resize_to_max_canvas",
        "is true: turbofit has no account of this setting",
    )
    rule = CanvasRule(
        tile_size=size,
        tokens_per_tile=(size // vision.patch_size // vision.merge) ** 2 + 1,
        max_dynamic_patch=images.integer("max_patches", _TILES, high=_MOST_TILES),
    )
    return Dims(text, vision, rule)


def _text(config: Section) -> TextDims:
    """Read the language model; every ``interleave_moe_layer_step``-th layer has experts."""
    text, section = tied_text(config, "Llama4TextModel"), config.part("text_config")
    step = section.integer("interleave_moe_layer_step", 1, high=1 << 10)
    layers = text.layers // step
    if "moe_layers" in section:
        named = set(section.integers("moe_layers"))
        layers = sum(1 for layer in range(text.layers) if layer in named)
    per_token = section.integer("num_experts_per_tok", 1, high=1 << 10)
    experts = section.integer("num_local_experts", 16, low=per_token, high=1 << 13)
    moe = MoeDims(
        experts=experts,
        experts_per_token=per_token,
        intermediate=text.intermediate,
        layers=layers,
        shared_intermediate=text.intermediate,
        step=step,
        shared_gate=False,
    )
    # The key intermediate_size is the width of experts; layers without experts have their own key.
    dense = section.integer("intermediate_size_mlp", 16384, high=1 << 20)
    return replace(text, intermediate=dense, moe=moe if layers else None)


def _vision(config: Section) -> VisionDims:
    """Read the tower; the projector must take the channels of whole windows."""
    vision = config.part("vision_config")
    ratio = vision.number("pixel_shuffle_ratio", 0.5, low=0.05, high=1)
    merge = round(1 / ratio)
    adapter = vision.integer("projector_output_dim", 4096, high=1 << 18)
    for key, default in (("projector_input_dim", 4096), ("vision_output_dim", 7680)):
        vision.refuse_if(
            vision.integer(key, default, high=1 << 18) != adapter,
            key,
            f"is not projector_output_dim's {adapter}",
        )
    tower = read_tower(vision, _TOWER, kind="llama4", merge=merge, projector=adapter)
    hidden, inter = tower.hidden, tower.intermediate
    vision.refuse_if(
        merge * ratio != 1 or hidden * merge**2 != inter,
        "pixel_shuffle_ratio",
        f"does not make {inter} channels of {hidden}",
    )
    return whole_windows(vision, tower)
