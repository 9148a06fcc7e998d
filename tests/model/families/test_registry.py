"""Every family reads any config, or refuses it as a user's error."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.checkpoints import LLAMA, QWEN, read
from turbofit.core.errors import TurbofitError
from turbofit.model.config import Section
from turbofit.model.families.engines import engine_problem
from turbofit.model.families.registry import VISION_READERS, read_dims
from turbofit.model.families.text import TEXT_ARCHITECTURES

pytestmark = pytest.mark.slow

KEYS = sorted({*LLAMA, *QWEN, "tie_word_embeddings", "head_dim", "quantization_config", "auto_map",
               "text_config", "llm_config", "ps_version", "downsample_ratio", "dtype",
               "max_dynamic_patch", "num_experts", "mlp_only_layers", "decoder_sparse_step",
               "image_grid_pinpoints", "vision_feature_layer", "vision_feature_select_strategy",
               "vision_aspect_ratio", "model_type", "num_multi_query_heads", "image_size",
               "patch_size", "num_positions", "num_heads", "cross_attention_layers",
               "max_num_tiles", "supported_aspect_ratios", "vision_output_dim",
               "intermediate_layers_indices",
               "deepstack_visual_indexes", "num_position_embeddings", "out_hidden_size", "size",
               "temporal_patch_size", "mm_tokens_per_image", "img_processor", "embd_layer",
               "num_crops", "multi_query_group_num", "kv_channels", "num_layers",
               "max_image_tiles", "longest_edge", "shortest_edge", "layer_types",
               "full_attention_interval", "linear_num_key_heads", "moe_layers", "max_patches",
               "interleave_moe_layer_step", "pixel_shuffle_ratio", "attn_output_gate"})  # fmt: skip
ARCHITECTURES = sorted({*TEXT_ARCHITECTURES, *VISION_READERS})
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats()
    | st.sampled_from(ARCHITECTURES) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
EVA_CLIP = {
    "hidden_size": 64, "num_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8,
    "image_size": 56, "patch_size": 14, "num_positions": 17,
}  # fmt: skip
PHI_EMBEDDING = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
    "use_hd_transform": True, "with_learnable_separator": True,
}  # fmt: skip
OUT = {"out_hidden_size": 256}
#: What makes the base of the fuzzed config one that is read.
VISION_PARTS = {
    "ChatGLMForConditionalGeneration": EVA_CLIP, "ChatGLMModel": EVA_CLIP,
    "CogVLMForCausalLM": EVA_CLIP, "Gemma3ForConditionalGeneration": {"patch_size": 14},
    "LlavaNextForConditionalGeneration": {"image_size": 336, "patch_size": 14},
    "LlavaOnevisionForConditionalGeneration": {"vision_use_head": False, "image_size": 384},
    "Qwen2VLForConditionalGeneration": {**QWEN["vision_config"], "hidden_size": 256},
    "Qwen2_5_VLForConditionalGeneration": {"out_hidden_size": 256, "hidden_size": 64},
    "Glm4vForConditionalGeneration": OUT, "Qwen3VLForConditionalGeneration": OUT,
    "Qwen3VLMoeForConditionalGeneration": OUT, "Qwen3_5ForConditionalGeneration": OUT,
    "Qwen3_5MoeForConditionalGeneration": OUT,
    "InternS1ProForConditionalGeneration": OUT, "InternS1_1_ForConditionalGeneration": OUT,
    "Llama4ForConditionalGeneration": {
        "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 256,
        "vision_output_dim": 4096,
    },
    "InternVLChatModel": {"hidden_size": 64, "num_attention_heads": 1, "image_size": 448},
    "KimiK25ForConditionalGeneration": {
        "merge_type": "sd2_tpool", "pos_emb_type": "divided_fixed", "patch_size": 14,
        "video_attn_type": "spatial_temporal", "merge_kernel_size": [2, 2], "hidden_size": 64,
        "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 256,
        "init_pos_emb_height": 4,
    },
}  # fmt: skip
THINKER = {
    "text_config": {**LLAMA, "num_key_value_heads": 2, "num_attention_heads": 2},
    "vision_config": OUT, "audio_config": {"output_dim": 256},
}  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=5),
    st.sampled_from(["", "text_config", "llm_config", "vision_config", "thinker_config"]),
    values,
    values,
)
def test_fuzzed_configs_raise_nothing_else(architecture, change, part, processor, tokenizer):
    config = copy.deepcopy(QWEN) | {
        "architectures": [architecture], "ps_version": "v2",
        "llm_config": LLAMA, "text_config": LLAMA | {"cross_attention_layers": [1]},
        "embd_layer": PHI_EMBEDDING,
        "img_processor": {"model_name": "openai/clip-vit-large-patch14-336"},
        "vision_config": VISION_PARTS.get(architecture, {}), "kv_channels": 32,
        "thinker_config": THINKER,
        "mm_tokens_per_image": 256 if architecture != "Gemma3ForConditionalGeneration" else 4,
    }  # fmt: skip
    if part and isinstance(config.get(part), dict):
        config[part] = config[part] | change
    else:
        config |= change
    files = {"preprocessor_config": processor, "tokenizer_config": tokenizer}
    try:
        model = read(config=config, **files)
    except TurbofitError:
        return
    assert model.parameters > 0
    assert model.weight_bytes > 0
    for engine in ("turbomind", "pytorch", "transformers"):
        engine_problem(model, engine)
    if model.image_rule is not None:
        for size in ((1, 1), (640, 480), (100, 10_000)):
            most = model.image_rule.worst_units()
            assert 1 <= model.image_rule.units(*size) <= most
            assert model.image_rule.tokens(*size) <= model.image_rule.unit_tokens(most)


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(("inner", "outer"), [(TIED, {}), ({}, TIED)])
def test_either_config_ties_the_head(inner, outer):
    """Transformers before 5 wrote it into the text_config alone."""
    text = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, **inner}
    config = {"text_config": text, "vision_config": {"hidden_size": 896}, **outer}
    section = Section(config, "config.json")
    dims = read_dims(section, "Qwen2VLForConditionalGeneration", None, [])
    assert dims.text.tie_word_embeddings
