"""The small files of LLaVA's hf format, made from the original's config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject
from turbofit.model.config import Section, parse_json
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.llava_tokens import Tokens
from turbofit.model.merge.tensors import StoredTensor

__all__ = ["FEATURES", "hf_config", "other_files", "vision_config"]

#: mm_vision_select_feature → vision_feature_select_strategy.
FEATURES: Final = {"patch": "default", "cls_patch": "full"}

_TEXT: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias",
    "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip
#: Mean and deviation of the pictures that OpenAI's CLIP was trained on.
_MEAN: Final = [0.48145466, 0.4578275, 0.40821073]
_STD: Final = [0.26862954, 0.26130258, 0.27577711]
_BICUBIC: Final = 3
#: The turns of LLaVA-1.5, for who asks the checkpoint; LMDeploy goes by the folder's name first.
_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- set name = {'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '') -%}
{{- name -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '</s>' if message['role'] == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def vision_config(tower: Mapping[str, StoredTensor], config: Section | None) -> JsonObject:
    """CLIP's vision config: sizes from the tensors, the rest from the tower's own config.json.

    Args:
        tower: tensors by their name in the tower, as ``embeddings.class_embedding``.
        config: the tower's config.json, None where it came without one.

    Raises:
        UsageError: the tensors are not CLIP's.
    """
    try:
        patches = tower["embeddings.patch_embedding.weight"].shape
        positions = tower["embeddings.position_embedding.weight"].shape[0]
        inner = tower["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, IndexError):
        raise UsageError(
            "the vision tower has not the tensors of CLIP",
            hint="name CLIP's folder: --vision-tower",
        ) from None
    layers = {name.split(".")[2] for name in tower if name.startswith("encoder.layers.")}
    hidden, channels, patch = patches[0], patches[1], patches[2]
    section = (config.section("vision_config") or config) if config else Section({}, "the tower")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        # Every CLIP of OpenAI has heads of 64.
        "num_attention_heads": section.integer("num_attention_heads", max(1, hidden // 64)),
        "num_channels": channels,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "hidden_act": section.string("hidden_act", "quick_gelu"),
        "layer_norm_eps": section.number("layer_norm_eps", 1e-5, low=0, high=1),
        "projection_dim": section.integer("projection_dim", 768),
    }


def hf_config(
    original: Section, vision: JsonObject, tokens: Tokens, rows: int, dtype: str
) -> JsonObject:
    """config.json of `LlavaForConditionalGeneration`.

    Args:
        original: config.json of `LlavaLlamaForCausalLM`.
        vision: what :func:`vision_config` gave.
        tokens: ids of the added tokens.
        rows: rows of the embeddings, padded.
        dtype: torch's name of the weights' dtype.
    """
    text = {key: original.values[key] for key in _TEXT if original.values.get(key) is not None}
    strategy = FEATURES[original.string("mm_vision_select_feature", "patch")]
    seen = (vision["image_size"] // vision["patch_size"]) ** 2
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokens.image,
        "image_seq_length": seen + (strategy == "full"),
        "pad_token_id": tokens.pad,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": original.values.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": rows,
        "text_config": {
            **text,
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": rows,
            "pad_token_id": tokens.pad,
            "torch_dtype": dtype,
        },
        "vision_config": {**vision, "torch_dtype": dtype},
    }


def other_files(
    original: Section, vision: JsonObject, tokens: Tokens, base: FolderFiles
) -> dict[str, str]:
    """Processor, chat template, tokenizer and generation config, by file name."""
    side = vision["image_size"]
    # The original pads a picture to a square in the mean colour before it scales it, where its
    # config says so; CLIP's processor, which llava-hf ships, would cut the edges off.
    pad = original.string("image_aspect_ratio", "") == "pad"
    image = {
        "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": pad,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    if not pad:
        del image["do_pad"]
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": FEATURES[
            original.string("mm_vision_select_feature", "patch")
        ],
    }
    files = {
        **tokens.files,
        "preprocessor_config.json": json.dumps(image, indent=2) + "\n",
        "processor_config.json": json.dumps(processor, indent=2) + "\n",
        "chat_template.jinja": _TEMPLATE,
    }
    if data := base.read("generation_config.json"):
        said = {**parse_json(data, "generation_config.json").values, "pad_token_id": tokens.pad}
        files["generation_config.json"] = json.dumps(said, indent=2) + "\n"
    return files
