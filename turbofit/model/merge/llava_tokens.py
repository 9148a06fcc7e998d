"""The two tokens that LLaVA's hf format has and its original lacks: ``<image>`` and ``<pad>``.

The original cuts a prompt at the text ``<image>``; the hf format has a token for it, and pads with
another. Both are appended to the tokenizer, as llava-hf's published checkpoints have them (32000
and 32001 behind LLaMA's 32000).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.model.config import parse_json
from turbofit.model.folder import FolderFiles
from turbofit.model.merge.output import json_text

__all__ = ["TOKENIZER_FILES", "Tokens", "add_tokens"]

#: Files that this module writes where the source has them.
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip

_IMAGE: Final = "<image>"
_PAD: Final = "<pad>"
_LARGEST: Final = 64 << 20
#: In a SentencePiece model, a protocol buffer of fields with a length: the tag of a piece.
_PIECE: Final = 0x0A


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
    found: dict[str, dict[str, Any]] = {}
    for name in TOKENIZER_FILES:
        data = files.read(name)
        found[name] = parse_json(data, name).values if data else {}
    whole, config = found["tokenizer.json"], found["tokenizer_config.json"]
    pieces = files.read_up_to("tokenizer.model", _LARGEST)
    if not whole and pieces is None:
        raise UsageError(
            f"{folder} has no tokenizer.json and no tokenizer.model",
            hint="finish the checkpoint's download",
        )
    ids = _known(found)
    model = whole.get("model")
    vocabulary = (model.get("vocab") if isinstance(model, dict) else None) or {}
    size = len(vocabulary)  # Unigram's is a list of pieces and scores
    if isinstance(vocabulary, dict):
        size = 1 + max(vocabulary.values(), default=-1)
    count = max(size, _piece_count(pieces) if pieces else 0, *(1 + one for one in ids.values()))
    new = [token for token in (_IMAGE, _PAD) if token not in ids]
    ids |= {token: number for number, token in enumerate(new, count)}
    both = {token: ids[token] for token in (_IMAGE, _PAD)}
    decoder = {
        **(config.get("added_tokens_decoder") or {}),
        **{str(number): _token(token) for token, number in both.items()},
    }
    # A template in tokenizer_config.json would be one for text alone.
    config = {key: value for key, value in config.items() if key != "chat_template"}
    config |= {
        "added_tokens_decoder": decoder, "pad_token": _PAD, "processor_class": "LlavaProcessor",
    }  # fmt: skip
    written = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {**found["special_tokens_map.json"], "pad_token": _PAD},
    }
    if whole:
        added = [{"id": ids[token], **_token(token)} for token in new]
        written["tokenizer.json"] = {
            **whole, "added_tokens": [*(whole.get("added_tokens") or ()), *added],
        }  # fmt: skip
    else:
        written["added_tokens.json"] = {**found["added_tokens.json"], **both}
    texts = {name: json_text(value) for name, value in written.items()}
    return Tokens(both[_IMAGE], both[_PAD], texts)


def _token(text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": text, **flags, "special": True}


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


def _piece_count(data: bytes) -> int:
    """Pieces of a SentencePiece model."""
    count = at = 0
    try:
        while at < len(data):
            tag, at, size, shift = data[at], at + 1, 0, 0
            while True:
                byte, at = data[at], at + 1
                size |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            if tag & 7 != 2:
                raise IndexError
            at, count = at + size, count + (tag == _PIECE)
    except IndexError:
        at = -1
    if at != len(data) or not count:
        raise UsageError(
            "tokenizer.model is not a SentencePiece model", hint="download the checkpoint again"
        )
    return count
