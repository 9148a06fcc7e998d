"""A checkpoint's weight files, and how files of the same layout are written anew."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.model.folder import INDEX, FolderFiles
from turbofit.model.merge.edits import Edit
from turbofit.model.merge.tensors import (
    StoredTensor,
    TensorFile,
    as_torch,
    open_store,
    torch_library,
    write_tensor,
)
from turbofit.model.safetensors import parse_index

__all__ = ["Shard", "ShardPiece", "header_of", "index_of", "open_shards", "write_shard"]

_BIN_INDEX: Final = "pytorch_model.bin.index.json"
_BIN_FILE: Final = re.compile(r"[\w-][\w.+-]{0,200}\.bin", re.ASCII)
_ITEM: Final = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


class Shard(NamedTuple):
    """One weight file of a checkpoint, and the tensors that count in it."""

    file: str
    store: TensorFile
    names: tuple[str, ...]


class ShardPiece(NamedTuple):
    """A tensor to write: where it comes from, and what is done to it on the way."""

    name: str
    stored: StoredTensor
    store: TensorFile
    key: str
    edits: tuple[Edit, ...] = ()


def open_shards(folder: str) -> list[Shard]:
    """The weight files of a folder, safetensors before torch's own, in the order of their names.

    Raises:
        UsageError: no weights, a damaged index, or a file that is missing.
    """
    files = FolderFiles(folder)
    where = _index(files)
    if where is None:
        names = _files(folder)
        if not names:
            raise UsageError(
                f"{folder} holds no weights to merge into", hint="finish the checkpoint's download"
            )
        stores = [(name, open_store(os.path.join(folder, name))) for name in names]
        return [Shard(name, store, tuple(store.entries)) for name, store in stores]
    shards = []
    for name in sorted(set(where.values())):
        if files.size(name) is None:
            raise UsageError(f"{name} is missing in {folder}", hint="finish the download")
        store = open_store(os.path.join(folder, name))
        kept = tuple(key for key in store.entries if where.get(key) == name)
        if missing := {key for key, file in where.items() if file == name} - set(kept):
            raise UsageError(
                f"{name} does not hold {min(missing)[:80]!r}, which the index places there",
                hint="download the checkpoint again",
            )
        shards.append(Shard(name, store, kept))
    return shards


def _index(files: FolderFiles) -> dict[str, str] | None:
    """Tensor → file, None where one file holds them all."""
    data = files.read_up_to(INDEX, 64 << 20)
    if data is not None:
        return parse_index(data, INDEX)
    data = files.read_up_to(_BIN_INDEX, 64 << 20)
    if data is None or any(name.endswith(".safetensors") for name in _files(files.path)):
        return None
    try:
        where = json.loads(data)["weight_map"]
        if where and all(_BIN_FILE.fullmatch(file) for file in where.values()):
            return dict(where)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise UsageError(f"{_BIN_INDEX} is not an index", hint="download the checkpoint again")


def _files(folder: str) -> list[str]:
    """Weight files where no index names them: the first kind that is there."""
    names = sorted(os.listdir(folder))
    for start, suffix in (
        ("model", ".safetensors"), ("", ".safetensors"), ("pytorch_model", ".bin"),
    ):  # fmt: skip
        if found := [one for one in names if one.startswith(start) and one.endswith(suffix)]:
            return found
    return []


def header_of(pieces: Sequence[ShardPiece]) -> tuple[list[ShardPiece], bytes]:
    """The pieces in the order of the file, and the file's head: length and JSON header.

    Wide dtypes come first, so that every tensor lies aligned to its dtype.
    """
    ordered = sorted(pieces, key=lambda piece: -_ITEM.get(piece.stored.dtype, 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in ordered:
        begin, end = end, end + piece.stored.bytes
        header[piece.name] = {
            "dtype": piece.stored.dtype,
            "shape": list(piece.stored.shape),
            "data_offsets": [begin, end],
        }
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return ordered, len(data).to_bytes(8, "little") + data


def write_shard(path: str, pieces: Sequence[ShardPiece], done: Callable[[int], None]) -> None:
    """Write one file of weights; in RAM is one tensor at a time.

    ``done`` hears how many bytes each tensor had.

    Raises:
        UsageError: a source cannot be read, or a changed tensor is not finite.
    """
    ordered, head = header_of(pieces)
    with open(path, "wb") as out:
        out.write(head)
        for piece in ordered:
            _write(piece, out)
            done(piece.stored.bytes)
        out.flush()
        os.fsync(out.fileno())
    for store in {id(piece.store): piece.store for piece in pieces}.values():
        store.close()


def _write(piece: ShardPiece, out: BinaryIO) -> None:
    was = piece.store.entries[piece.key]
    if not piece.edits and was == piece.stored:
        piece.store.copy(piece.key, out)
        return
    tensor = piece.store.read(piece.key).to(as_torch(piece.stored.dtype))
    for edit in piece.edits:
        tensor = edit(tensor)
    if tuple(tensor.shape) != piece.stored.shape:
        raise AssertionError(f"{piece.name} became {tuple(tensor.shape)}")
    if piece.edits and not bool(torch_library().isfinite(tensor).all()):
        raise UsageError(
            f"{piece.name} would hold what is no number: the adapter is broken, or"
            f" {piece.stored.dtype} too narrow for the sum",
            hint="try --dtype bfloat16; if it stays so, take another checkpoint of the training",
        )
    write_tensor(tensor, out)


def index_of(files: Mapping[str, Sequence[ShardPiece]]) -> str:
    """``model.safetensors.index.json`` of the files."""
    total = sum(piece.stored.bytes for pieces in files.values() for piece in pieces)
    where = {piece.name: file for file, pieces in files.items() for piece in pieces}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(document, indent=2) + "\n"
