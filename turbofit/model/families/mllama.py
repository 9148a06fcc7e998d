"""Llama 3.2 Vision: images enter a few cross-attention layers only, and not the prompt.

Before the tower, every image is padded to the model's largest number of tiles. The image's tokens
fill only the caches of the cross-attention layers. LMDeploy 0.18 does not run this model.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.images import CrossRule
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, read_tower
from turbofit.model.families.text import read_text

_TOWER: Final = {
    "num_hidden_layers": 32, "hidden_size": 1280, "intermediate_size": 5120, "patch_size": 14,
    "image_size": 448, "num_channels": 3,
}  # fmt: skip
_CROSS: Final = (3, 8, 13, 18, 23, 28, 33, 38)
#: The number of the tower's intermediate layers whose outputs join the last layer's output.
_INTERMEDIATE: Final = 5
_SHAPES: Final = 8


def read(parts: CheckpointConfig) -> Dims:
    """Read a MllamaForConditionalGeneration; missing keys take Transformers' defaults."""
    config = parts.config
    section = config.part("text_config")
    text = read_text(section, "MllamaForCausalLM")
    cross = section.integers("cross_attention_layers") or _CROSS
    section.refuse_if(
        len(set(cross)) != len(cross) or not all(0 <= layer < text.layers for layer in cross),
        "cross_attention_layers",
        f"are not different layers from 0 to {text.layers - 1}",
    )
    vision = _vision(config)
    size = vision.image_size or 0
    parts.images.refuse_if(
        parts.images.integer("max_image_tiles", vision.max_tiles) != vision.max_tiles,
        "max_image_tiles",
        f"is not the tower's {vision.max_tiles}",
    )
    edges = parts.images.part("size")
    edges.refuse_if(
        edges.integer("height", vision.image_size) != vision.image_size,
        "height",
        f"is not the tower's {vision.image_size}",
    )
    rule = CrossRule(
        tile_size=size,
        tokens_per_tile=(size // vision.patch_size) ** 2 + 1,
        max_dynamic_patch=vision.max_tiles,
        thumbnail=False,
    )
    return Dims(replace(text, cross_layers=tuple(sorted(cross))), vision, rule)


def _vision(config: Section) -> VisionDims:
    """Read the tower with its second stack of layers and its gated embeddings."""
    vision = config.part("vision_config")
    shapes = vision.values.get("supported_aspect_ratios")
    layers = vision.integers("intermediate_layers_indices")
    outputs = 1 + (len(layers) or _INTERMEDIATE)
    heads = "attention_heads" if "attention_heads" in vision else "num_attention_heads"
    tower = read_tower(
        vision,
        {**_TOWER, heads: 16},
        kind="mllama",
        extra_layers=vision.integer("num_global_layers", 8, high=1 << 10),
        merge=1,
        qkv_bias=False,
        outputs=outputs,
        shapes=len(shapes) if isinstance(shapes, list) else _SHAPES,
        max_tiles=vision.integer("max_num_tiles", 4, high=1 << 8),
    )
    vision.refuse_if(
        vision.integer("vision_output_dim", 7680) != outputs * tower.hidden,
        "vision_output_dim",
        f"is not {outputs} times {tower.hidden} channels",
    )
    return tower
