"""A checkpoint's folder: its JSON files and the headers of its weights.

Files stand between two ``|~|``, the first byte of each says which one it is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from bench.fuzz.scratch import scratch
from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.struct import decode, to_json
from turbofit.model.checkpoint import Origin, read_checkpoint
from turbofit.model.folder import FolderFiles, is_complete

_GOLDEN: Final = Path(__file__).resolve().parents[2] / "golden" / "checkpoints.yaml"
_SEPARATOR: Final = b"|~|"
_NAMES: Final = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "video_preprocessor_config.json", "model.safetensors.index.json", "model.safetensors",
    "model-1.safetensors",
)  # fmt: skip
WORDS: Final = (
    "|~|", '"architectures":["', '"hidden_size":', '"num_hidden_layers":', '"num_attention_heads":',
    '"num_key_value_heads":', '"head_dim":', '"vision_config":{', '"text_config":{',
    '"llm_config":{',
    '"quantization_config":{"quant_method":"', '"awq"', '"gptq"', '"fp8"', '"bits":',
    '"group_size":',
    '"rope_scaling":{', '"sliding_window":', '"layer_types":["full_attention"]', '"num_experts":',
    '"max_dynamic_patch":', '"downsample_ratio":', '"image_size":', '"patch_size":', '"size":{',
    '"shortest_edge":', '"max_pixels":', '"min_pixels":', '"do_pan_and_scan":', '"weight_map":{',
    '"dtype":"BF16"', '"shape":[', '"data_offsets":[', "null", "true", "[]", "{}", "0", "-1",
    "1e308",
    "NaN", "Infinity", "16777216", "18446744073709551616",
)  # fmt: skip


def one(data: bytes) -> None:
    """A checkpoint is refused (UsageError), or is a model that survives JSON."""
    folder = scratch("checkpoint")
    for name in _NAMES:
        (folder / name).unlink(missing_ok=True)
    for piece in data.split(_SEPARATOR):
        if piece:
            (folder / _NAMES[piece[0] % len(_NAMES)]).write_bytes(piece[1:])
    where = str(folder)
    is_complete(where)
    try:
        model = read_checkpoint(FolderFiles(where), Origin("m", "folder", where))
    except UsageError:
        return
    assert decode(to_json(model), Model, what="the model") == model
    assert model.parameters > 0


def seeds() -> list[bytes]:
    """The configs of the golden set, one of each architecture, and small headers of weights."""
    checkpoints: dict[str, Any] = yaml.safe_load(_GOLDEN.read_text(encoding="utf-8"))
    found = []
    for files in checkpoints.values():
        pieces = [
            bytes((place,)) + json.dumps(files[Path(name).stem], separators=(",", ":")).encode()
            for place, name in enumerate(_NAMES)
            if Path(name).stem in files
        ]
        found.append(_SEPARATOR.join(pieces))
    return [*found, *(found[0] + _SEPARATOR + piece for piece in _weights())]


def _weights() -> Iterator[bytes]:
    entry = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
    header = json.dumps({"model.layers.0.mlp.gate_proj.weight": entry}).encode()
    for place in (6, 7):
        yield bytes((place,)) + struct.pack("<Q", len(header)) + header + bytes(8)
    index = json.dumps({"weight_map": {"a.weight": "model-1.safetensors"}}).encode()
    yield bytes((5,)) + index
