"""Idefics3 and SmolVLM: tiles for SigLIP, merged by a connector; only Transformers runs them."""

from __future__ import annotations

from typing import Final

from turbofit.core.images import LongestEdgeRule, TileRule
from turbofit.core.images.longest_edge import LARGEST_EDGE
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import (
    CheckpointConfig,
    Dims,
    inner_refusal,
    read_tower,
    tied_text,
)

_TOWER: Final = {
    "num_hidden_layers": 12, "hidden_size": 1152, "num_attention_heads": 16,
    "intermediate_size": 3072, "patch_size": 32, "image_size": 224, "num_channels": 3,
}  # fmt: skip
_MERGE: Final = 2
#: Transformers' default number of tiles along the longer side.
_TILES: Final = 4


def read(parts: CheckpointConfig) -> Dims:
    """Read an Idefics3ForConditionalGeneration or SmolVLMForConditionalGeneration.

    Transformers identifies the language model by ``model_type``, and ignores the class that
    published checkpoints also name.
    """
    config = parts.config
    kind = config.part("text_config").string("model_type", "llama")
    if kind != "llama":
        raise inner_refusal(parts.architecture, kind)
    # Only the outer config decides whether embeddings and head are tied.
    text = tied_text(config, "LlamaForCausalLM")
    section, merge = config.part("vision_config"), config.integer("scale_factor", _MERGE, high=64)
    vision = read_tower(section, _TOWER, kind="idefics3", merge=merge)
    size, patch = vision.image_size or 0, vision.patch_size
    section.refuse_if(
        size % 2 or size // patch < 1 or size // patch % merge,
        "image_size",
        f"{size} is not whole squares of {merge} x {merge} patches",
    )
    return Dims(text, vision, _rule(parts.images, vision))


def _rule(values: Section, vision: VisionDims) -> LongestEdgeRule | TileRule:
    """Read the image rule: one tile, or a grid of tiles by the longer side of the image."""
    tile = vision.image_size or 1
    tokens = (tile // vision.patch_size // vision.merge) ** 2
    if not values.boolean("do_image_splitting", True):
        return TileRule.square(tile, tokens + 3)  # three tokens stand around the tile
    tiles = values.part("max_image_size")
    tiles.refuse_if(
        tiles.integer("longest_edge", tile) != tile, "longest_edge", f"is not the tower's {tile}"
    )
    longest = values.part("size").integer("longest_edge", _TILES * tile)
    values.refuse_if(
        longest % tile or longest > LARGEST_EDGE,
        "size",
        f"{longest} is not whole tiles of {tile} up to {LARGEST_EDGE}",
    )
    return LongestEdgeRule(
        tile_size=tile, tokens_per_tile=tokens, max_dynamic_patch=(longest // tile) ** 2
    )
