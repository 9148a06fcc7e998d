"""GLM-4V, GLM-4.1V and the first GLM-4, whose config has keys of its authors' own.

GLM-4.1V resizes as Qwen2-VL does, but counts an image as two frames in its pixel bounds. An image
with a side below a window is enlarged first (Transformers 4 refuses the image).
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.images import PatchRule
from turbofit.core.model import TextDims, VisionDims
from turbofit.core.version import REFERENCE
from turbofit.model.config import Section
from turbofit.model.families.dims import CheckpointConfig, Dims, read_tower
from turbofit.model.families.eva_clip import read_eva_clip, square_rule
from turbofit.model.families.qwen_vl import check_settings
from turbofit.model.families.text import read_text

_TOWER: Final = {
    "depth": 24, "hidden_size": 1536, "num_heads": 12, "patch_size": 14, "image_size": 336,
    "in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip
#: Transformers' bounds for the pixels of all frames of an image.
_SMALLEST_PIXELS: Final = 112 * 112
_LARGEST_PIXELS: Final = 28 * 28 * 15000


def read_chatglm(parts: CheckpointConfig) -> Dims:
    """Read a ChatGLMModel, with EVA-CLIP if it is a GLM-4V.

    Missing keys take the defaults of the checkpoint's remote code.
    """
    config = parts.config
    text = _text(config)
    section = config.section("vision_config")
    if section is None:
        return Dims(text)
    vision = read_eva_clip(section, "eva_clip_glm", merge=2, projector=text.intermediate)
    return Dims(text, vision, square_rule(vision))


def _text(config: Section) -> TextDims:
    """Read the language model of the first GLM-4; missing keys have the remote code's defaults."""
    hidden = config.integer("hidden_size", 4096, high=1 << 18)
    heads = config.divisor("num_attention_heads", hidden, "channels", 32)
    config.refuse_if(
        config.integer("kv_channels", 128, high=1 << 10) != hidden // heads,
        "kv_channels",
        f"is not {hidden} / {heads}, as LMDeploy takes it",
    )
    config.refuse_if(
        not config.boolean("rmsnorm", True) or not config.boolean("post_layer_norm", True),
        "rmsnorm",
        "or post_layer_norm is false, which LMDeploy does not run",
    )
    groups = config.divisor("multi_query_group_num", heads, "heads", 1)
    bias = config.boolean("add_bias_linear", False)
    return TextDims(
        architecture="ChatGLMModel",
        layers=config.integer("num_layers", 28, high=1 << 10),
        hidden=hidden,
        heads=heads,
        kv_heads=groups if config.boolean("multi_query_attention", False) else heads,
        head_dim=hidden // heads,
        intermediate=config.integer("ffn_hidden_size", 13696, high=1 << 20),
        vocab=config.integer("padded_vocab_size", 65024),
        max_position_embeddings=config.integer("seq_length", 2048, high=1 << 30),
        qkv_bias=bias or config.boolean("add_qkv_bias", False),
        output_bias=bias,
        mlp_bias=bias,
    )


def read_glm4v(parts: CheckpointConfig) -> Dims:
    """Read a Glm4vForConditionalGeneration (GLM-4.1V); missing keys take Transformers' defaults.

    The language model's keys stand at the top of config.json, or in its ``text_config``.
    """
    config = parts.config
    section = config.section("text_config")
    if section and "vocab_size" not in config:
        parts.warnings.append(
            f"the language model's keys are in text_config: LMDeploy {REFERENCE}'s PyTorch"
            " engine looks for them at the top, and fails at its start"
        )
    # Transformers 4 wrote tie_word_embeddings only into text_config.
    text = read_text(section or config, "Glm4vTextModel")
    if config.boolean("tie_word_embeddings", False):
        text = replace(text, tie_word_embeddings=True)
    vision = _vision(config, text.hidden)
    return Dims(text, vision, _rule(parts.images, vision))


def _vision(config: Section, text_hidden: int) -> VisionDims:
    """Read GLM-4.1V's tower, whose MLPs are as wide as its output.

    The key ``intermediate_size`` is the width of the projector's MLP.
    """
    vision = config.part("vision_config")
    vision.refuse_if(
        vision.integer("out_hidden_size", 4096, high=1 << 18) != text_hidden,
        "out_hidden_size",
        f"is not the language model's {text_hidden}",
    )
    return read_tower(
        vision,
        _TOWER,
        kind="glm4v",
        intermediate=text_hidden,
        norm="rms_norm",
        qkv_bias=vision.boolean("attention_bias", False),
        gated_mlp=True,
        projector=vision.integer("intermediate_size", 13696, high=1 << 20),
    )


def _rule(values: Section, vision: VisionDims) -> PatchRule:
    """Return the image rule, with pixel bounds for one frame.

    The config's bounds are for several frames, so each bound is divided by the number of frames.
    The lower bound is rounded up.
    """
    check_settings(values, vision)
    edges = values.part("size")
    frames = values.integer("temporal_patch_size", vision.temporal_patch, high=64)
    least = edges.integer("shortest_edge", _SMALLEST_PIXELS, high=1 << 32)
    most = edges.integer("longest_edge", _LARGEST_PIXELS, low=frames, high=1 << 32)
    return PatchRule(
        patch_size=vision.patch_size,
        merge=vision.merge,
        min_pixels=-(-least // frames),
        max_pixels=most // frames,
        client_knobs=False,
        frames=frames,
        enlarge=True,
    )
