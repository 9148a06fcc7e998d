"""Phi-3-vision and Phi-3.5-vision: a page of tiles, padded to the most there may be.

The image is scaled to the widest row of tiles whose page, at its own shape, has no more than
``num_crops`` of them; a portrait is laid on its side for that. A tile of the whole image comes
first. The tower sees as many tiles as the page may have, whatever the image: the rest are zeros.
Only those of the page give tokens, a token ends each line, and one stands between page and whole.

The preprocessor is the checkpoints' own code and was not run; the tokens of a page are LMDeploy's.
"""

from __future__ import annotations

from math import ceil, isqrt
from typing import Final

from turbofit.core.model import HdRule, VisionDims
from turbofit.model.families.dims import Dims, Parts
from turbofit.model.families.text import read_text

__all__ = ["least_tokens", "most_tokens", "read", "tokens"]

_TOWER: Final = "openai/clip-vit-large-patch14-336"
_EMBEDDING: Final = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
    "use_hd_transform": True, "with_learnable_separator": True,
}  # fmt: skip
_MOST_CROPS: Final = 1 << 10


def tokens(rule: HdRule, width: int, height: int, limit: int) -> int:
    """Tokens of the language model for one image under a limit of tiles."""
    long, short = max(width, height), min(width, height)
    ratio, scale = long / short, 1
    while scale * ceil(scale / ratio) <= limit:
        scale += 1
    scale -= 1
    lines = max(1, ceil(int(scale * rule.tile_size / ratio) / rule.tile_size))
    return _page(rule, *((scale, lines) if height > width else (lines, scale)))


def most_tokens(rule: HdRule, units: int) -> int:
    """Tokens of the worst image of so many tiles, exactly: a column, which has most lines."""
    return _page(rule, max(1, units - 1), 1)


def least_tokens(rule: HdRule) -> int:
    """Tokens that no image has fewer of, exactly: a page of one tile, and the whole image's."""
    return _page(rule, 1, 1)


def _page(rule: HdRule, rows: int, columns: int) -> int:
    side = isqrt(rule.tokens_per_tile)
    return (rows * columns + 1) * rule.tokens_per_tile + 1 + (rows + 1) * side


def read(parts: Parts) -> Dims:
    """A Phi3VForCausalLM; the tower is the one that LMDeploy and the remote code both spell out.

    Raises:
        UsageError: another tower, or a variant that LMDeploy 0.18 does not run.
    """
    parts.warn_without_processor()
    config = parts.config
    text = read_text(config, "Phi3ForCausalLM")
    if config.required("img_processor").string("model_name", "") != _TOWER:
        raise config.error("img_processor", f"is not {_TOWER}, the only one that LMDeploy runs")
    layer = config.required("embd_layer")
    for key, value in _EMBEDDING.items():
        if layer.values.get(key) != value:
            raise layer.error(key, f"is not {value!r}, which LMDeploy runs alone")
    vision = VisionDims(
        kind="phi3v", layers=24, hidden=1024, heads=16, intermediate=4096, patch_size=14,
        image_size=336,
    )  # fmt: skip
    crops = parts.processor.integer("num_crops", 1, high=_MOST_CROPS) if parts.processor else 16
    rule = HdRule(tile_size=336, tokens_per_tile=144, max_dynamic_patch=crops)
    return Dims(text, vision, rule)
