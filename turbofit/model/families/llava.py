"""LLaVA in the Transformers format: 1.5 (one tile an image), NeXT and OneVision (grids).

LLaVA-1.5 crops an image to the middle square of its tower. Checkpoints in their authors' own format
(`liuhaotian/...`) are refused, since no engine of LMDeploy runs this format.
"""

from __future__ import annotations

from typing import Final, Literal

from turbofit.core.images import AnyresRule, TileRule
from turbofit.core.images.anyres import Grid
from turbofit.core.model import VisionDims
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, nested_text, read_tower, refusal

#: The CLIP tower that Transformers takes if the config has no section for the tower.
_CLIP_LARGE: Final = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
#: Transformers' defaults for the keys that a CLIP tower's section lacks.
_CLIP: Final = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
}  # fmt: skip
#: The SigLIP tower that Transformers takes if the config has no section for the tower.
_SIGLIP_SO400M: Final = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
#: Transformers' defaults for the keys that a SigLIP tower's section lacks.
_SIGLIP: Final = {**_CLIP, "patch_size": 16}
#: Defaults by the kind of the tower, and by whether the config has a section for the tower.
_DEFAULTS: Final = {
    ("clip", True): _CLIP, ("clip", False): _CLIP_LARGE, ("siglip", True): _SIGLIP,
    ("siglip", False): _SIGLIP_SO400M,
}  # fmt: skip
_TOWERS: Final[dict[str, Literal["clip", "siglip"]]] = {
    "clip_vision_model": "clip",
    "siglip_vision_model": "siglip",
}
_MOST_GRIDS: Final = 512
_OV_GRIDS: Final = tuple((384 * high, 384 * wide) for high in range(1, 7) for wide in range(1, 7))
_NEXT_GRIDS: Final = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def read(parts: CheckpointConfig) -> Dims:
    """Read a LlavaForConditionalGeneration."""
    text = nested_text(parts, "llama")
    vision = _vision(parts.config, "clip_vision_model", newline=False)
    tokens = _tile_tokens(parts.config, vision)
    rule = TileRule.square(vision.image_size or 0, tokens)
    return Dims(text, vision, rule)


def read_next(parts: CheckpointConfig) -> Dims:
    """Read a LlavaNextForConditionalGeneration."""
    text = nested_text(parts, "llama")
    vision = _vision(parts.config, "clip_vision_model", newline=True)
    grids = _read_grids(parts.config, parts.images, vision) or _NEXT_GRIDS
    return Dims(text, vision, _anyres(parts.config, vision, grids, None))


def read_onevision(parts: CheckpointConfig) -> Dims:
    """Read a LlavaOnevisionForConditionalGeneration."""
    config = parts.config
    text = nested_text(parts, "qwen2")
    vision = _vision(config, "siglip_vision_model", newline=True)
    grids = _read_grids(config, parts.images, vision) or _OV_GRIDS
    aspect = config.string("vision_aspect_ratio", "anyres_max_9")
    most = aspect.removeprefix("anyres_max_")
    config.refuse_if(
        not most.isdigit() or not 0 < int(most) < 1 << 10,
        "vision_aspect_ratio",
        f"{aspect[:40]!r} is not anyres_max_ and a number",
    )
    return Dims(text, vision, _anyres(config, vision, grids, int(most)))


def _read_grids(config: Section, images: Section, vision: VisionDims) -> tuple[Grid, ...]:
    """Read ``image_grid_pinpoints`` from the model's config or the processor's settings.

    Grids that differ between these two files are refused.
    """
    grids, others = _pinpoints(config, vision), _pinpoints(images, vision)
    images.refuse_if(
        grids and others and others != grids, "image_grid_pinpoints", "differ from config.json's"
    )
    return grids or others


def _pinpoints(section: Section, vision: VisionDims) -> tuple[Grid, ...]:
    """Read the grids, as (height, width) in pixels; each side must be whole tiles."""
    values, side = section.values.get("image_grid_pinpoints"), vision.image_size or 1
    if values is None:
        return ()
    pairs = values if isinstance(values, list) else [values]
    whole = all(
        isinstance(pair, list) and len(pair) == 2
        and all(type(size) is int and 0 < size <= 1 << 16 and size % side == 0 for size in pair)
        for pair in pairs
    )  # fmt: skip
    what = f"is no list of pairs of a height and a width, in whole tiles of {side} pixels"
    section.refuse_if(not whole or not 0 < len(pairs) <= _MOST_GRIDS, "image_grid_pinpoints", what)
    return tuple((height, width) for height, width in pairs)


def _anyres(
    config: Section, vision: VisionDims, grids: tuple[Grid, ...], most: int | None
) -> AnyresRule:
    """Return the image rule of tiles in one of ``grids``; ``most`` tiles at most, if given."""
    tokens, side = _tile_tokens(config, vision), vision.image_size or 1
    config.refuse_if(
        tokens != (side // vision.patch_size) ** 2,
        "vision_feature_select_strategy",
        "leaves a number of tokens that is no square",
    )
    config.refuse_if(
        any(height % side or width % side for height, width in grids),
        "image_grid_pinpoints",
        f"are missing, and the default grids are not whole tiles of {side}",
    )
    return AnyresRule(
        tile_size=side,
        tokens_per_tile=tokens,
        max_dynamic_patch=max(rows * columns // side**2 for rows, columns in grids),
        grids=grids,
        most_tiles=most,
    )


def _vision(config: Section, default: str, *, newline: bool) -> VisionDims:
    """Read the tower; layers after ``vision_feature_layer`` are stored and built, but never run.

    ``default``: the ``model_type`` of a tower without this key. ``newline``: whether the model has
    an embedding for the end of each line of patches.
    """
    section = config.section("vision_config")
    values = section or Section({}, f"{config.what}: vision_config")
    named = values.string("model_type", default)
    kind = _TOWERS.get(named)
    if named == "pixtral":
        raise refusal("PixtralForConditionalGeneration")
    values.refuse_if(
        kind is None, "model_type", f"{named[:40]!r} is a tower that turbofit does not know"
    )
    values.refuse_if(
        kind == "siglip" and values.boolean("vision_use_head", True) and section,
        "vision_use_head",
        "is not false: turbofit has no account of a pooling head",
    )
    layer = config.values.get("vision_feature_layer", -1)
    config.refuse_if(type(layer) is not int, "vision_feature_layer", "is not one layer")
    config.refuse_if(
        not config.boolean("multimodal_projector_bias", True),
        "multimodal_projector_bias",
        "is false, which LMDeploy does not read",
    )
    keys = {**_DEFAULTS[kind or "clip", section is not None], "num_channels": 3}
    return read_tower(values, keys, kind=kind, merge=1, newline=newline)


def _tile_tokens(config: Section, vision: VisionDims) -> int:
    """Tokens of a tile: its patches, and CLIP's class token if the strategy is ``full``."""
    patches = ((vision.image_size or 0) // vision.patch_size) ** 2
    default = "default" if vision.kind == "clip" else "full"
    strategy = config.string("vision_feature_select_strategy", default)
    config.refuse_if(
        strategy not in {"default", "full"} or (vision.kind == "siglip" and strategy != "full"),
        "vision_feature_select_strategy",
        f"is {strategy[:40]!r}",
    )
    config.refuse_if(not patches, "vision_config", "has patches that are larger than the image")
    return patches + (1 if vision.kind == "clip" and strategy == "full" else 0)
