"""Writes a stand-in tokenizer: image tokens are exact, but each byte of text is a token.

A text has about four times as many tokens as with the model's own tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import field

from turbofit.core.presets import load_yaml, presets_dir
from turbofit.core.struct import JsonObject, Struct


class Tokenizer(Struct, forbid_unknown_fields=True):
    """The settings of a stand-in tokenizer: its class, its image token and its special tokens."""

    class_: str = field(name="class", default="PreTrainedTokenizerFast")
    image: str = "<IMG_CONTEXT>"
    #: The text that a processor puts before each prompt; empty for none.
    begin: str = ""
    extra_special_tokens: dict[str, str] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)


@cache
def common() -> JsonObject:
    """Return the contents that all twins' tokenizers and configs share (`presets/twins.yaml`)."""
    return load_yaml(presets_dir() / "twins.yaml")


def special_tokens(vocab: int, kind: Tokenizer | None = None) -> dict[str, int]:
    """Return the ids of the special tokens, by token.

    The published ids are used if they are below ``vocab``, else the last ids of the vocabulary.
    ``kind`` is None for a model of text alone.
    """
    text: dict[str, int] = common()["text_tokens"]
    known: dict[str, int] = {**text, **common()["image_tokens"]}
    known |= kind.special if kind is not None else {}
    if vocab > max(known.values()):
        return known
    if vocab > max(text.values()) and kind is None:
        return text
    first = vocab - len(known)
    return {name: first + i for i, name in enumerate(known)}


def byte_alphabet() -> list[str]:
    """Return one printable character for each byte, as byte-level BPE tokenizers have them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def byte_level(vocab: Mapping[str, int], special: Mapping[str, int]) -> JsonObject:
    """Make the content of a ``tokenizer.json`` in which each token is a byte or a special token."""
    data = common()
    added = [
        {"id": number, "content": token, **data["special_token"]}
        for token, number in special.items()
    ]
    model = {**data["bpe"], "vocab": dict(vocab)}
    return {**data["tokenizer"], "added_tokens": added, "model": model}


def write_tokenizer(
    folder: Path, special: Mapping[str, int], positions: int, kind: Tokenizer | None = None
) -> None:
    """Write a tokenizer's two files; ``positions`` is the most tokens of a prompt."""
    kind = kind or Tokenizer()
    vocab = {character: i for i, character in enumerate(byte_alphabet())} | dict(special)
    data = byte_level(vocab, special)
    template = str(common()["chat_template"])
    config: dict[str, Any] = {
        "tokenizer_class": kind.class_,
        **common()["tokenizer_config"],
        "model_max_length": positions,
        "chat_template": template.replace("IMAGE", kind.image),
    }
    if kind.begin:
        config["bos_token"] = kind.begin
    if kind.extra_special_tokens:
        config["extra_special_tokens"] = kind.extra_special_tokens
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
