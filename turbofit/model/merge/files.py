"""Files of tensors, read one tensor at a time, and the atomic output folder of a merge.

Dtypes are safetensors' names (``BF16``); shapes count elements; sizes are bytes.
"""

from __future__ import annotations

import ctypes
import fnmatch
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.json_types import JsonObject
from turbofit.core.process.files import sync_folder
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.model.caches import cached_snapshot
from turbofit.model.folder import INDEX, FolderFiles, sharded
from turbofit.model.names import read_name
from turbofit.model.presets import HUB_ID, find_preset, load_preset
from turbofit.model.safetensors import BITS, LARGEST_INDEX, PREFIX, Tensor, parse_index

#: safetensors' names of dtypes → torch's names.
DTYPES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
#: The dtypes of weights, which a merge may change or cast.
FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})

#: torch's tensors by their names.
TorchTensors = dict[str, Any]
_BIN_INDEX: Final = "pytorch_model.bin.index.json"
_HINT: Final = "download the file again, or check who made it"


class StoredTensor(NamedTuple):
    """A tensor in a file; ``start`` is its offset in safetensors, or -1 in torch's format."""

    path: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = -1

    def read(self) -> Any:
        """Read the tensor (torch, CPU, contiguous); the caller may change it.

        Raises:
            UsageError: the file cannot be read, or ends too early.
        """
        torch = torch_library()
        if self.start < 0:
            tensor = torch_tensors(self.path)[self.key]
            return tensor.clone(memory_format=torch.contiguous_format)
        dtype = _as_torch(self.dtype)
        buffer = bytearray(math.prod(self.shape) * BITS[self.dtype] // 8)
        if not buffer:
            return torch.empty(self.shape, dtype=dtype)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                whole = file.readinto(buffer) == len(buffer)
        except OSError as exc:
            raise UsageError(f"{self.path} cannot be read: {exc.strerror}", hint=_HINT) from None
        if not whole:
            raise UsageError(f"{self.path} ends too early", hint=_HINT)
        return torch.frombuffer(buffer, dtype=dtype).reshape(self.shape)

    def piece(self, name: str, dtype: str, *edits: Callable[[Any], Any]) -> Piece:
        """The tensor as a piece to write, under another name; floats are cast to ``dtype``."""
        kept = dtype if self.dtype in FLOATS else self.dtype
        return Piece(name, self, kept, self.shape, edits)


class Piece(NamedTuple):
    """A tensor to write, and the edits that change it before.

    An edit takes the tensor in the dtype of the result, and returns the changed tensor.
    """

    name: str
    source: StoredTensor
    dtype: str
    shape: tuple[int, ...]
    edits: tuple[Callable[[Any], Any], ...] = ()

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


def torch_library() -> Any:
    """Import torch, which planning does not need.

    Raises:
        PackageError: torch is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise PackageError(
            "merging and converting weights needs torch, which is not installed",
            hint="pip install torch (the CPU build is enough)",
        ) from None


def _as_torch(dtype: str) -> Any:
    return getattr(torch_library(), DTYPES[dtype])


def open_weights(folder: str) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of a checkpoint by name, for each file, in the order of the files' names.

    Raises:
        UsageError: the folder holds no weights.
    """
    files, tensors = FolderFiles(folder), {}
    if headers := files.weights().tensors:
        tensors = {key: _stored(folder, key, tensor) for key, tensor in headers.items()}
    elif index := files.read(_BIN_INDEX, LARGEST_INDEX):
        where = parse_index(index, _BIN_INDEX, ".bin")
        tensors = sharded(where, _BIN_INDEX, partial(open_tensors, folder))
    else:
        for name in sorted(fnmatch.filter(os.listdir(folder), "pytorch_model*.bin")):
            tensors = open_tensors(folder, name) | tensors
    if not tensors:
        raise UsageError(
            f"{folder} holds no weights to merge into", hint="finish the checkpoint's download"
        )
    opened: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start)):
        opened.setdefault(os.path.basename(stored.path), {})[key] = stored
    return opened


def open_tensors(folder: str, name: str) -> dict[str, StoredTensor]:
    """The tensors in a file of safetensors' or torch's format, by name.

    Raises:
        UsageError: the file is missing, or does not contain tensors.
    """
    if name.endswith(".safetensors"):
        header = FolderFiles(folder).header(name)
        return {key: _stored(folder, key, tensor) for key, tensor in header.items()}
    if FolderFiles(folder).size(name) is None:
        raise UsageError(f"{name} is missing in {folder}", hint="finish the download")
    path, names = os.path.join(folder, name), {_as_torch(key): key for key in DTYPES}
    return {
        key: StoredTensor(
            path, key, names.get(tensor.dtype) or _quantised(path, key, tensor.dtype),
            tuple(tensor.shape),
        )
        for key, tensor in torch_tensors(path).items()
    }  # fmt: skip


def _stored(folder: str, key: str, tensor: Tensor) -> StoredTensor:
    path = os.path.join(folder, tensor.file)
    if tensor.dtype not in DTYPES:
        _quantised(path, key, tensor.dtype)
    return StoredTensor(path, key, tensor.dtype, tensor.shape, tensor.begin)


def _quantised(path: str, key: str, dtype: object) -> NoReturn:
    raise UsageError(
        f"{os.path.basename(path)}: {key[:80]!r} is {dtype}: a quantised checkpoint cannot be"
        " merged into",
        hint="merge into the 16-bit checkpoint that it was made from, and quantise the result",
    )


@lru_cache(maxsize=4)
def torch_tensors(path: str) -> TorchTensors:
    """The tensors of a ``.bin``, a pickle, read with ``weights_only``, so that no code runs.

    They are mapped from the file: resident pages are page cache, which the kernel can reclaim.

    Raises:
        UsageError: the file contains something other than named tensors.
    """
    torch, name = torch_library(), os.path.basename(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as exc:  # noqa: BLE001 - torch and pickle raise any type for a damaged file
        anew = "what torch before 1.6 wrote: torch.save(torch.load(FILE), FILE)"
        raise UsageError(
            f"{name} cannot be read as weights alone: {str(exc)[:160]}", hint=f"{_HINT}; {anew}"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise UsageError(f"{name} holds something else than named tensors", hint=_HINT)
    return content


def write_tensors(path: str, pieces: Sequence[Piece]) -> Iterator[int]:
    """Write a safetensors file one tensor at a time; yields the bytes of each tensor.

    Wide dtypes come first, so that every tensor is aligned to its dtype.
    """
    ordered = sorted(pieces, key=lambda piece: -BITS[piece.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in ordered:
        begin, end = end, end + piece.bytes
        header[piece.name] = {
            "dtype": piece.dtype, "shape": piece.shape, "data_offsets": (begin, end),
        }  # fmt: skip
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % PREFIX)
    with open(path, "wb") as out:
        out.write(len(data).to_bytes(PREFIX, "little") + data)
        for piece in ordered:
            _write(piece, out)
            yield piece.bytes
    torch_tensors.cache_clear()


def _write(piece: Piece, out: BinaryIO) -> None:
    tensor = piece.source.read().to(_as_torch(piece.dtype))
    for edit in piece.edits:
        tensor = edit(tensor)
    if tuple(tensor.shape) != piece.shape:
        raise AssertionError(f"{piece.name} became {tuple(tensor.shape)}")
    if piece.edits and not bool(torch_library().isfinite(tensor).all()):
        raise UsageError(
            f"{piece.name} would hold what is no number: the adapter is broken, or {piece.dtype}"
            " too narrow for the sum",
            hint="try --dtype bfloat16; if it stays so, take another checkpoint of the training",
        )
    tensor = tensor.contiguous()
    if piece.bytes:
        # Torch shares its memory only through numpy, which may not be installed.
        out.write((ctypes.c_char * piece.bytes).from_address(tensor.data_ptr()))


_WEIGHTS: Final = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json",
)  # fmt: skip
_SLACK: Final = 1 << 20


class Result(NamedTuple):
    """The content of the output folder: weight files, small text files, and files to copy."""

    files: Mapping[str, list[Piece]]
    texts: Mapping[str, str]
    copies: list[str]
    architecture: str
    tower: str | None = None


def _size(*files: list[Piece]) -> int:
    return sum(piece.bytes for pieces in files for piece in pieces)


def json_text(value: JsonObject) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def weight_files(base: Iterable[str], files: Sequence[list[Piece]]) -> dict[str, list[Piece]]:
    """Name the output files: as in the base if those are safetensors and equally many."""
    names, count = list(base), len(files)
    if len(names) != count or not all(name.endswith(".safetensors") for name in names):
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        names = names if count > 1 else ["model.safetensors"]
    return dict(zip(names, files, strict=True))


def copied_files(folder: str, written: Container[str], ends: tuple[str, ...] = ()) -> list[str]:
    """The files of a folder that are copied unchanged: all files except weights.

    Files in ``written`` are left out, and files whose names have one of the ``ends``.
    """
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file()
        and not entry.name.startswith(".")
        and not entry.name.endswith((*_WEIGHTS, *ends))
        and entry.name not in written
    )


def check_target(out: str, sources: tuple[str, ...], *, force: bool) -> str:
    """The real path of the output folder; a folder that must not be replaced is refused.

    Raises:
        UsageError: the folder is a file, is not empty, or contains or is in a source.
    """
    target = os.path.realpath(os.path.expanduser(out))
    parent, is_folder = os.path.dirname(target), os.path.isdir(target)
    for source in map(os.path.realpath, sources):
        if os.path.commonpath([target, source]) in (target, source):
            hint = "name a new folder beside the sources"
            raise UsageError(f"{out} and {source} are, or hold, one another", hint=hint)
    if os.path.lexists(target) and not is_folder:
        raise UsageError(f"{out} is a file", hint="name a new folder")
    if os.path.ismount(target):
        what = f"{out} is a mount point, which cannot be replaced"
        raise UsageError(what, hint="name a folder inside it")
    if not os.path.isdir(parent):
        raise UsageError(f"{parent} is not a folder", hint="make it first")
    if is_folder and not force and os.listdir(target):
        hint = "name a new folder, or replace all that is in it: --force"
        raise UsageError(f"{out} is not empty", hint=hint)
    return target


def write(result: Result, folder: str, target: str, say: Callable[[str], None]) -> tuple[str, ...]:
    """Write everything into a temporary folder, which replaces the target at the end.

    Returns the names of the files. After an error, or if the disk is too small, nothing remains.

    Raises:
        UsageError: the disk is too small, or a file cannot be written.
    """
    source = FolderFiles(folder)
    weights = _size(*result.files.values())
    needed = weights + sum(source.size(name) or 0 for name in result.copies) + _SLACK
    parent, name = os.path.split(target)
    if needed > (free := shutil.disk_usage(parent).free):
        raise UsageError(
            f"the result needs {format_bytes(needed)}, {parent} has {format_bytes(free)} left",
            hint="free some space, or write to another disk",
        )
    texts = dict(result.texts)
    if len(result.files) > 1 or source.size(INDEX) is not None:
        where = {piece.name: file for file, pieces in result.files.items() for piece in pieces}
        index = {"metadata": {"total_size": weights}, "weight_map": dict(sorted(where.items()))}
        texts[INDEX] = json_text(index)
    temporary = os.path.join(parent, f".{name}.merge-{token_hex(8)}")
    try:
        os.mkdir(temporary)
        _write_files(result, texts, folder, temporary, say)
        sync_folder(temporary)
        _replace(temporary, target)
        sync_folder(parent)
    except OSError as exc:
        raise UsageError(
            f"{target} cannot be written: {exc.strerror or exc}",
            hint="choose a folder that you can write to, on a disk with room",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(sorted({*result.files, *texts, *result.copies}))


def _write_files(
    result: Result, texts: Mapping[str, str], folder: str, to: str, say: Callable[[str], None]
) -> None:
    for name in result.copies:
        shutil.copyfile(os.path.join(folder, name), os.path.join(to, name))
    for name, text in texts.items():
        Path(to, name).write_text(text, encoding="utf-8")
    total, written = _size(*result.files.values()), 0
    for number, (name, pieces) in enumerate(result.files.items(), 1):
        changed = sum(bool(piece.edits) for piece in pieces)
        say(
            f"writing {name} ({number} of {len(result.files)}): {format_bytes(_size(pieces))},"
            f" {len(pieces)} tensors, {changed} changed"
        )
        for size in write_tensors(os.path.join(to, name), pieces):
            written += size
            tell(Step("writing", written, total, "bytes"))
    for name in (*result.copies, *texts, *result.files):
        with open(os.path.join(to, name), "rb") as file:
            os.fsync(file.fileno())


def _replace(temporary: str, target: str) -> None:
    """Move the new folder to its place; if that fails, the old one is restored."""
    old = f"{temporary}.old"
    with suppress(FileNotFoundError):
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def located(
    name: str, file: str, wanted: str = "", say: Callable[[str], None] = lambda _: None
) -> str:
    """The path of a folder, or of a snapshot in the local hub cache that has this file.

    ``wanted`` is what an error recommends to name instead.

    Raises:
        UsageError: it is neither a folder nor in the local hub cache.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return os.path.abspath(path)
    hub_id, revision, notes = read_name(name)
    for note in notes:
        say(note)
    if preset := find_preset(hub_id):
        hub_id = load_preset(preset).hub_id
    known = HUB_ID.fullmatch(hub_id)
    if known and (cached := cached_snapshot(hub_id, revision, file)):
        return cached
    at = f" --revision {revision}" if revision else ""
    download = f"hf download {hub_id}{at}, or " if known else ""
    raise UsageError(
        f"{name[:200]} is neither a folder nor in the local hub cache",
        hint=f"{download}name {wanted or f'a folder with {file}'}",
    )
