"""Writes header-only checkpoints: what an engine needs to allocate, and no weights.

The files are as long as real ones and sparse: they take a few blocks of the disk, and a loader that
maps them reads zeros.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from turbofit.rehearse.checkpoint.dims import RehearsedModel
from turbofit.rehearse.checkpoint.model_config import config_of, preprocessor_of
from turbofit.rehearse.checkpoint.tensors import Entry, tensors
from turbofit.rehearse.checkpoint.tokenizer import write_tokenizer

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}


def write_header(path: Path, entries: Iterable[Entry]) -> int:
    """Writes a safetensors file whose data is a hole; returns the data's bytes.

    Raises:
        OSError: the file system has no files of this length.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "turbofit": "pretend: no data"}}
    at = 0
    for name, dtype, shape in entries:
        size = _BYTES[dtype]
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + at)
    return at


def write_model(model: RehearsedModel, folder: Path) -> Path:
    """Writes a header-only checkpoint of a model's dimensions; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(config_of(model), indent=1)
    (folder / "config.json").write_text(config, encoding="utf-8")
    if model.vision is not None:
        (folder / "preprocessor_config.json").write_text(
            json.dumps(preprocessor_of(model), indent=1), encoding="utf-8"
        )
    if model.vision is not None and model.vision.kind == "internvit_hf":
        processor = {"image_seq_length": 256, "processor_class": "InternVLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    if model.vision is not None and model.vision.kind == "qwen3":
        video = preprocessor_of(model) | {"video_processor_type": "Qwen3VLVideoProcessor"}
        video.pop("image_processor_type")
        text = json.dumps(video, indent=1)
        (folder / "video_preprocessor_config.json").write_text(text, encoding="utf-8")
    write_header(folder / "model.safetensors", tensors(model))
    write_tokenizer(model, folder)
    return folder
