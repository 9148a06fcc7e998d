"""Phi-3-vision and Phi-3.5-vision: an image is a page of tiles, padded to a fixed number."""

from __future__ import annotations

from typing import Final

from turbofit.core.images import HdRule
from turbofit.core.model import VisionDims
from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.text import read_text

_TOWER: Final = "openai/clip-vit-large-patch14-336"
_EMBEDDING: Final = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
    "use_hd_transform": True, "with_learnable_separator": True,
}  # fmt: skip
_MOST_CROPS: Final = 1 << 10


def read(parts: CheckpointConfig) -> Dims:
    """Read a Phi3VForCausalLM; its tower is fixed in the code of LMDeploy and of the checkpoint."""
    config = parts.config
    text = read_text(config, "Phi3ForCausalLM")
    config.refuse_if(
        config.required("img_processor").string("model_name", "") != _TOWER,
        "img_processor",
        f"is not {_TOWER}, the only one that LMDeploy runs",
    )
    layer = config.required("embd_layer")
    for key, value in _EMBEDDING.items():
        layer.refuse_if(
            layer.values.get(key) != value,
            key,
            f"is not {value!r}, the only value that LMDeploy runs",
        )
    vision = VisionDims(
        kind="phi3v", layers=24, hidden=1024, heads=16, intermediate=4096, patch_size=14,
        image_size=336,
    )  # fmt: skip
    crops = parts.images.integer("num_crops", 1 if parts.processor else 16, high=_MOST_CROPS)
    rule = HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=crops)
    return Dims(text, vision, rule)
