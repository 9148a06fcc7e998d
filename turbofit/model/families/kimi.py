"""Kimi-K2.5 and K2.6: a three-dimensional MoonViT, and Kimi-K2 with DeepSeek-V3's keys.

Published checkpoints have experts in 4 bits. Plans count no videos, since LMDeploy's front end
refuses videos.
"""

from __future__ import annotations

from typing import Final

from turbofit.core.images import NavitRule
from turbofit.core.images.navit import LARGEST_SIDE
from turbofit.core.model import VisionDims
from turbofit.core.version import REFERENCE
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims
from turbofit.model.families.text import read_text

#: The settings of MoonViT that LMDeploy runs; LMDeploy refuses all other settings. Source:
#: lmdeploy kimi_k25_vision.py::MoonViT3dModel.__init__ #0f5b1b
_KNOWN: Final = {
    "merge_type": "sd2_tpool", "pos_emb_type": "divided_fixed",
    "video_attn_type": "spatial_temporal",
}  # fmt: skip
_PATCH, _MERGE = 14, 2
#: Transformers' defaults for checkpoints without a preprocessor config; published configs have the
#: same values.
_BUDGET, _SIDE = 16384, 512


def read(parts: CheckpointConfig) -> Dims:
    """Read a KimiK25ForConditionalGeneration, with the keys of its own config class."""
    section = parts.config.required("text_config")
    text = read_text(section, "KimiK2ForCausalLM", tied=False)
    vision = _vision(parts.config.required("vision_config"), text.hidden)
    return Dims(text, vision, read_rule(parts.images))


def _vision(config: Section, text_hidden: int) -> VisionDims:
    """Read the tower; a key may begin with ``vt_``."""

    def dim(key: str, high: int) -> int:
        return config.integer(key if key in config else f"vt_{key}", high=high)

    for key, known in _KNOWN.items():
        config.refuse_if(
            config.string(key, "") != known,
            key,
            f"is not {known}, the only value that LMDeploy {REFERENCE} runs",
        )
    config.refuse_if(
        config.integer("patch_size") != _PATCH or config.integers("merge_kernel_size") != (2, 2),
        "patch_size",
        "is not 14, or merge_kernel_size not 2 x 2",
    )
    hidden, height = dim("hidden_size", 1 << 16), config.integer("init_pos_emb_height", high=1024)
    for key, same in (
        ("text_hidden_size", text_hidden), ("mm_hidden_size", hidden),
        ("init_pos_emb_width", height),
    ):  # fmt: skip
        config.refuse_if(config.integer(key, same, high=1 << 18) != same, key, f"is not {same}")
    heads = "num_attention_heads"
    return VisionDims(
        kind="moonvit",
        layers=dim("num_hidden_layers", 1 << 10),
        hidden=hidden,
        heads=config.divisor(heads if heads in config else f"vt_{heads}", hidden, "channels"),
        intermediate=dim("intermediate_size", 1 << 20),
        patch_size=_PATCH,
        image_size=height * _PATCH,
        merge=_MERGE,
    )


def read_rule(images: Section) -> NavitRule:
    """Read the image rule from a preprocessor config.

    Raises:
        UsageError: a setting contradicts the tower.
    """
    media = images.part("media_proc_cfg")
    for key, expected in (("patch_size", _PATCH), ("merge_kernel_size", _MERGE)):
        media.refuse_if(
            media.integer(key, expected) != expected, key, f"is not the tower's {expected}"
        )
    return NavitRule(
        patch_size=_PATCH,
        merge=_MERGE,
        max_pixels=media.integer("in_patch_limit", _BUDGET, high=1 << 24) * _PATCH**2,
        side=media.integer("patch_limit_on_one_side", _SIDE, low=_MERGE, high=LARGEST_SIDE),
    )
