"""A small stand-in tokenizer for header-only checkpoints: one token a byte, plus special tokens.

Enough for an engine's server to build prompts. Text takes about four times as many tokens as with
the model's own tokenizer; image tokens are counted exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import field

from turbofit.core.json_types import JsonObject
from turbofit.core.struct import Struct


class Tokenizer(Struct, forbid_unknown_fields=True):
    """What kinds differ in: class, what stands for an image in a prompt, special tokens.

    ``special`` are ids beside those that all have.
    """

    class_: str = field(name="class", default="PreTrainedTokenizerFast")
    image: str = "<IMG_CONTEXT>"
    extra_special_tokens: dict[str, str] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)


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


def special_tokens(vocab: int, kind: Tokenizer | None = None) -> dict[str, int]:
    """Special tokens and their ids: the published ones where they fit into the vocabulary.

    Args:
        vocab: how many tokens the model knows.
        kind: of a model that takes images; None of one that takes text alone.
    """
    known = _QWEN2 | _INTERNVL | (kind.special if kind is not None else {})
    if vocab > max(known.values()):
        return known
    if vocab > max(_QWEN2.values()) and kind is None:
        return _QWEN2
    first = vocab - len(known)
    return {name: first + i for i, name in enumerate(known)}


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


def write_tokenizer(
    folder: Path, special: Mapping[str, int], positions: int, kind: Tokenizer | None = None
) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        folder: where.
        special: ids of special tokens, see ``special_tokens``.
        positions: tokens of a prompt at most.
        kind: of a model that takes images.
    """
    kind = kind or Tokenizer()
    vocab = {character: i for i, character in enumerate(byte_alphabet())} | dict(special)
    data = byte_level(vocab, special)
    config: dict[str, Any] = {
        "tokenizer_class": kind.class_,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHATML.replace("IMAGE", kind.image),
    }
    if kind.extra_special_tokens:
        config["extra_special_tokens"] = kind.extra_special_tokens
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
