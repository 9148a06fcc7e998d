"""Files of tensors, read and written by `safetensors` and torch, and the atomic folder of a merge.

Dtypes are safetensors' names (``BF16``); shapes count elements; sizes are bytes.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NamedTuple

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.installation import install_command
from turbofit.core.json_types import JsonObject
from turbofit.core.process.files import sync_folder
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.model.caches import cached_snapshot
from turbofit.model.folder import INDEX, FolderFiles, sharded
from turbofit.model.names import read_name
from turbofit.model.presets import HUB_ID, find_preset, load_preset
from turbofit.model.safetensors import BITS, LARGEST_INDEX, parse_index

#: safetensors' names of dtypes → torch's names.
DTYPES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip
#: The dtypes of weights, which a merge may change or cast.
FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})

_BIN_INDEX: Final = "pytorch_model.bin.index.json"
_HINT: Final = "download the file again, or check who made it"


class StoredTensor(NamedTuple):
    path: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Any:
        """The tensor (torch, CPU), mapped from its file: only a copy of it may be changed."""
        if self.path.endswith(".safetensors"):
            return _opened(self.path).get_tensor(self.key)
        return torch_tensors(self.path)[self.key]

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

    def size(self) -> int:
        """The bytes of the result."""
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def made(self) -> Any:
        """Read and edit the tensor.

        Raises:
            UsageError: the result has infinite values, or values that are no number.
        """
        torch = torch_library()
        tensor = self.source.read().to(
            getattr(torch, DTYPES[self.dtype]), copy=True, memory_format=torch.contiguous_format
        )
        for edit in self.edits:
            tensor = edit(tensor)
        if tuple(tensor.shape) != self.shape:
            raise AssertionError(f"{self.name} became {tuple(tensor.shape)}")
        if self.edits and not bool(torch.isfinite(tensor).all()):
            raise UsageError(
                f"{self.name} would hold what is no number: the adapter is broken, or {self.dtype}"
                " too narrow for the sum",
                hint="try --dtype bfloat16; if it stays so, take another checkpoint of the"
                " training",
            )
        return tensor


def torch_library() -> Any:
    """Import torch, which planning does not need.

    Raises:
        PackageError: torch or safetensors is not installed.
    """
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("torch")
    except ImportError:
        raise PackageError(
            "merging and converting weights needs torch and safetensors, and one is not installed",
            hint=f"{install_command('merge')} (a CPU build of torch is enough)",
        ) from None


def open_weights(folder: str) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of a checkpoint by name, for each file, in the order of the files' names.

    Raises:
        UsageError: the folder holds no weights.
    """
    files, tensors = FolderFiles(folder), {}
    if headers := files.weights().tensors:
        tensors = {
            key: _stored(os.path.join(folder, tensor.file), key, tensor.dtype, tensor.shape)
            for key, tensor in headers.items()
        }
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
    for key, stored in sorted(tensors.items(), key=lambda item: item[1].path):
        opened.setdefault(os.path.basename(stored.path), {})[key] = stored
    return opened


def open_tensors(folder: str, name: str) -> dict[str, StoredTensor]:
    """The tensors in a file of safetensors' or torch's format, by name.

    Raises:
        UsageError: the file is missing, or does not contain tensors.
    """
    files, path = FolderFiles(folder), os.path.join(folder, name)
    if name.endswith(".safetensors"):
        return {
            key: _stored(path, key, tensor.dtype, tensor.shape)
            for key, tensor in files.header(name).items()
        }
    if files.size(name) is None:
        raise UsageError(f"{name} is missing in {folder}", hint="finish the download")
    names = {f"torch.{theirs}": key for key, theirs in DTYPES.items()}
    return {
        key: _stored(path, key, names.get(str(tensor.dtype), str(tensor.dtype)), tensor.shape)
        for key, tensor in torch_tensors(path).items()
    }


def _stored(path: str, key: str, dtype: str, shape: Iterable[int]) -> StoredTensor:
    if dtype not in DTYPES:
        raise UsageError(
            f"{os.path.basename(path)}: {key[:80]!r} is {dtype}: a quantised checkpoint cannot be"
            " merged into",
            hint="merge into the 16-bit checkpoint that it was made from, and quantise the result",
        )
    return StoredTensor(path, key, dtype, tuple(shape))


@lru_cache(maxsize=4)
def _opened(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


@lru_cache(maxsize=4)
def torch_tensors(path: str) -> dict[str, Any]:
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
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise UsageError(f"{name} holds something else than named tensors", hint=_HINT)
    return content


def close_files() -> None:
    """Close the files that tensors were read from."""
    _opened.cache_clear()
    torch_tensors.cache_clear()


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

    One file's tensors at a time are in RAM. Returns the names of the files. After an error, or if
    the disk is too small, nothing remains.

    Raises:
        UsageError: the disk is too small, or a file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    source = FolderFiles(folder)
    sizes = {name: sum(map(Piece.size, pieces)) for name, pieces in result.files.items()}
    weights = sum(sizes.values())
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
    temporary, written = os.path.join(parent, f".{name}.merge-{token_hex(8)}"), 0
    try:
        os.mkdir(temporary)
        for name in result.copies:
            shutil.copyfile(os.path.join(folder, name), os.path.join(temporary, name))
        for name, text in texts.items():
            Path(temporary, name).write_text(text, encoding="utf-8")
        for number, (name, pieces) in enumerate(result.files.items(), 1):
            changed, tensors = sum(bool(piece.edits) for piece in pieces), {}
            say(
                f"writing {name} ({number} of {len(result.files)}):"
                f" {format_bytes(sizes[name])}, {len(pieces)} tensors, {changed} changed"
            )
            for piece in pieces:
                tensors[piece.name] = piece.made()
                written += piece.size()
                tell(Step("writing", written, weights, "bytes"))
            save_file(tensors, os.path.join(temporary, name), metadata={"format": "pt"})
        for entry in os.scandir(temporary):
            with open(entry.path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        _replace(temporary, target)
        sync_folder(parent)
    except (OSError, SafetensorError) as exc:
        raise UsageError(
            f"{target} cannot be written: {getattr(exc, 'strerror', None) or exc}",
            hint="choose a folder that you can write to, on a disk with room",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(sorted({*result.files, *texts, *result.copies}))


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


def repository_of(name: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """The hub id that a name means (None if it means no hub id), and its revision."""
    hub_id, revision, _ = read_name(name, revision)
    if preset := find_preset(hub_id):
        hub_id = load_preset(preset).hub_id
    return hub_id if HUB_ID.fullmatch(hub_id) else None, revision


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
    for note in read_name(name).notes:
        say(note)
    hub_id, revision = repository_of(name)
    if hub_id and (cached := cached_snapshot(hub_id, revision, file)):
        return cached
    at = f" --revision {revision}" if revision else ""
    download = f"turbofit download {hub_id}{at}, or " if hub_id else ""
    raise UsageError(
        f"{name[:200]} is neither a folder nor in the local hub cache",
        hint=f"{download}name {wanted or f'a folder with {file}'}",
    )
