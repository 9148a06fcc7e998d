"""Writes header-only checkpoints: what an engine needs to allocate, and no weights.

The files are as long as real ones and sparse: they take a few blocks of the disk, and a loader that
maps them reads zeros.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from turbofit.rehearse.checkpoint.kinds import Entry

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "U8": 1, "F8_E4M3": 1}
_SHARD = 8 << 30
#: What a packed tensor's shape was: LMDeploy compares its two numbers with the model's own.
_SHAPE, _PACKED = ".weight_shape", ".weight_packed"
_IN_A_WORD = 8
_NONE: Mapping[str, tuple[int, int]] = MappingProxyType({})


def write_header(
    path: Path, entries: Iterable[Entry], stored: Mapping[str, tuple[int, int]] = _NONE
) -> int:
    """Writes a safetensors file whose data is a hole; returns the data's bytes.

    Args:
        path: of the file.
        entries: of its tensors.
        stored: the numbers of those that hold a shape.

    Raises:
        OSError: the file system has no files of this length.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "turbofit": "pretend: no data"}}
    at, shapes = 0, b""
    ordered = sorted(entries, key=lambda entry: entry[0].endswith(_SHAPE))
    for name, dtype, shape in ordered:
        if name.endswith(_SHAPE):
            shapes += struct.pack("<2i", *stored[name])
        size = _BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
    if shapes:
        with path.open("r+b") as file:
            file.seek(-len(shapes), os.SEEK_END)
            file.write(shapes)
    return at


def write_weights(entries: Iterable[Entry], folder: Path) -> None:
    """Writes one file, or several and an index: Linux maps none that is larger than its memory."""
    shards: list[list[Entry]] = []
    room = 0
    shapes: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry[0].endswith(_PACKED):
            outs, words = entry[2]
            shapes[entry[0].removesuffix(_PACKED) + _SHAPE] = outs, words * _IN_A_WORD
        size = _BYTES[entry[1]] * prod(entry[2])
        if size > room:
            shards.append([])
            room = _SHARD
        shards[-1].append(entry)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        weight_map = {
            entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard
        }
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        write_header(folder / name, shard, shapes)
