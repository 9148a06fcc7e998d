"""A checkpoint's tensors without their data: torch ``meta`` tensors from safetensors headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject

# safetensors' names of types, with torch's (github.com/huggingface/safetensors, README).
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_header(path: Path) -> dict[str, JsonObject]:
    """The header of one safetensors file: name to dtype, shape and data_offsets."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise UsageError(f"{path} is not a safetensors file", hint="download it again")
        header = json.loads(file.read(struct.unpack("<Q", start)[0]))
    header.pop("__metadata__", None)
    return {str(k): v for k, v in header.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"no safetensors files in {folder}",
            hint="a rehearsal reads their headers: give a checkpoint in safetensors format",
        )
    return files


class HeaderCheckpoint:
    """Stands in for LMDeploy's checkpoint: same keys, same shapes, no data.

    Args:
        folder: the checkpoint.
        mappings: LMDeploy's renaming functions, applied to each key.
    """

    def __init__(self, folder: Path, mappings: Iterable[Callable[[str], str]] = ()) -> None:
        self._entries: dict[str, dict[str, Any]] = {}
        renames = list(mappings)
        for path in weight_files(folder):
            for key, entry in read_header(path).items():
                name = key
                for rename in renames:
                    name = rename(name)
                self._entries[name] = entry

    def _tensor(self, entry: dict[str, Any], index: Any) -> Any:
        import torch

        dtype = getattr(torch, TORCH_DTYPES[entry["dtype"]])
        tensor = torch.empty(tuple(entry["shape"]), dtype=dtype, device="meta")
        return tensor if index is None else tensor[index].clone()

    def get(self, key: str, index: Any = None) -> Any:
        """The tensor at a key; KeyError where there is none."""
        return self._tensor(self._entries[key], index)

    def pop(self, key: str, index: Any = None) -> Any:
        """The tensor at a key, which is then forgotten."""
        return self._tensor(self._entries.pop(key), index)

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._entries

    def keys(self) -> Iterator[str]:
        """All keys, renamed."""
        return iter(self._entries)

    def close(self) -> None:
        """Forgets everything."""
        self._entries = {}
