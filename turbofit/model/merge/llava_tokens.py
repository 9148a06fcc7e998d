"""The two tokens that LLaVA's hf format has and its original lacks: ``<image>`` and ``<pad>``.

The original cuts a prompt at the text ``<image>``; the hf format has a token for it, and pads with
another. Both are appended to the tokenizer, as llava-hf's published checkpoints have them (32000
and 32001 behind LLaMA's 32000).
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.model.config import parse_json
from turbofit.model.folder import FolderFiles

__all__ = ["IMAGE", "PAD", "TOKENIZER_FILES", "Tokens", "add_tokens"]

IMAGE: Final = "<image>"
PAD: Final = "<pad>"
#: Files that this module writes where the source has them.
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

_LARGEST: Final = 64 << 20


class Tokens(NamedTuple):
    """The tokens' ids, and the tokenizer's files with them in it."""

    image: int
    pad: int
    files: dict[str, str]


def add_tokens(folder: str) -> Tokens:
    """Append both tokens to the tokenizer of a folder; one that is there already is kept.

    Raises:
        UsageError: the folder has no tokenizer, or one that cannot be read.
    """
    files = FolderFiles(folder)
    found = {name: _json(files, name) for name in TOKENIZER_FILES}
    whole = found["tokenizer.json"]
    pieces = files.read_up_to("tokenizer.model", _LARGEST)
    if not whole and pieces is None:
        raise UsageError(
            f"{folder} has no tokenizer.json and no tokenizer.model",
            hint="finish the checkpoint's download",
        )
    known = _known(found)
    count = 1 + max((-1, *known.values(), *_vocabulary(whole).values()))
    if pieces is not None:
        count = max(count, _piece_count(pieces))
    ids = {}
    for token in (IMAGE, PAD):
        ids[token] = known.get(token, count)
        count = max(count, ids[token] + 1)
    new = {token: number for token, number in ids.items() if token not in known}
    written = {"tokenizer_config.json": _dump(_configured(found["tokenizer_config.json"], ids))}
    if whole:
        whole.setdefault("added_tokens", [])
        whole["added_tokens"] += [{"id": number, **_token(token)} for token, number in new.items()]
        written["tokenizer.json"] = _dump(whole)
    else:
        written["added_tokens.json"] = _dump({**found["added_tokens.json"], **ids})
    special = {**found["special_tokens_map.json"], "pad_token": PAD}
    written["special_tokens_map.json"] = _dump(special)
    return Tokens(ids[IMAGE], ids[PAD], written)


def _json(files: FolderFiles, name: str) -> dict[str, Any]:
    data = files.read(name)
    return parse_json(data, name).values if data else {}


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _token(text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": text, **flags, "special": True}


def _configured(config: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """tokenizer_config.json with both tokens, and without a template for text alone."""
    decoder = dict(config.get("added_tokens_decoder") or {})
    decoder |= {str(number): _token(token) for token, number in ids.items()}
    config = {key: value for key, value in config.items() if key != "chat_template"}
    return {
        **config,
        "added_tokens_decoder": decoder,
        "pad_token": PAD,
        "processor_class": "LlavaProcessor",
    }


def _known(found: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Tokens that were added before, by any of the files that say so."""
    added = found["added_tokens.json"].items()
    known = {token: number for token, number in added if type(number) is int}
    decoder = found["tokenizer_config.json"].get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and number.isdecimal():
            known[str(entry.get("content"))] = int(number)
    for entry in found["tokenizer.json"].get("added_tokens") or []:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            known[str(entry.get("content"))] = entry["id"]
    return known


def _vocabulary(whole: dict[str, Any]) -> dict[str, int]:
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
        return {"": len(vocabulary) - 1}
    return vocabulary if isinstance(vocabulary, dict) else {}


def _piece_count(data: bytes) -> int:
    """Pieces of a SentencePiece model: its protocol buffer's first field, once for each."""
    count = at = 0
    try:
        while at < len(data):
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == 2:
                size, at = _varint(data, at)
                at += size
            elif kind == 0:
                _, at = _varint(data, at)
            else:
                at += {1: 8, 5: 4}[kind]
            count += tag >> 3 == 1
    except (IndexError, KeyError):
        at = -1
    if at != len(data) or not count:
        raise UsageError(
            "tokenizer.model is not a SentencePiece model", hint="download the checkpoint again"
        )
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
