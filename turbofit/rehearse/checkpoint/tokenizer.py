"""A small stand-in tokenizer for header-only checkpoints: one token a byte, plus special tokens.

Enough for an engine's server to build prompts. Text takes about four times as many tokens as with
the model's own tokenizer; image tokens are counted exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbofit.core.json_types import JsonObject
from turbofit.rehearse.checkpoint.dims import RehearsedModel

# Ids of Qwen2's published tokenizer; InternVL's on top of it (their tokenizer_config.json).
_QWEN2 = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_INTERNVL = {"<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667}
#: Qwen3-Omni's, and what its processor calls them.
_OMNI = {"<|audio_start|>": 151669, "<|audio_end|>": 151670, "<|audio_pad|>": 151675}
_OMNI_ROLES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
#: Kimi-K2.5's of images; ids are free.
_KIMI = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
_KIMI_IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
#: ChatML; content is text, or parts of which an image or video becomes the family's own marker.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE"
    "{% elif p['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif p['type'] == 'text' %}"
    "{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_INTERNVL_IMAGE = "<IMG_CONTEXT>"


def special_tokens(model: RehearsedModel) -> dict[str, int]:
    """Special tokens and their ids: the published ones where they fit into the vocabulary."""
    known = _QWEN2 | _INTERNVL
    if model.vision is not None and model.vision.audio is not None:
        known |= _OMNI
    if model.vision is not None and model.vision.kind == "moonvit":
        known |= {name: 151700 + i for i, name in enumerate(_KIMI)}
    names = [*known]
    if model.text.vocab > max(known.values()):
        return known
    if model.text.vocab > max(_QWEN2.values()) and model.vision is None:
        return _QWEN2
    first = model.text.vocab - len(names)
    return {name: first + i for i, name in enumerate(names)}


def byte_alphabet() -> list[str]:
    """One printable character for each byte, as byte-level BPE tokenizers use them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def byte_level(vocab: Mapping[str, int], special: Mapping[str, int]) -> JsonObject:
    """A ``tokenizer.json``: byte-level BPE without merges, so that a token is a byte or special.

    Args:
        vocab: ids by token; the special ones may be among them.
        special: ids of the special ones.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token, number) for token, number in special.items()],
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": True},
        "post_processor": None,
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [],
        },
    }


def _added(token: str, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def write_tokenizer(model: RehearsedModel, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` for a model."""
    special = special_tokens(model)
    vocab = {character: i for i, character in enumerate(byte_alphabet())} | special
    data = byte_level(vocab, special)
    kind = model.vision.kind if model.vision is not None else ""
    qwen = kind.startswith("qwen")
    image = _QWEN_IMAGE if qwen else _KIMI_IMAGE if kind == "moonvit" else _INTERNVL_IMAGE
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer" if qwen else "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": model.text.positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHATML.replace("IMAGE", image),
    }
    if model.vision is not None and model.vision.kind == "internvit_hf":
        config["extra_special_tokens"] = {
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<|video_pad|>",
        }
    if model.vision is not None and model.vision.audio is not None:
        config["extra_special_tokens"] = _OMNI_ROLES
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
