"""Reads and writes files of tensors with `safetensors` and torch, and makes a merge's folder.

Tensors are torch's, and memory-mapped, so the kernel can reclaim the pages that were read. Only
copies of tensors may be changed.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NamedTuple

from turbofit.core.errors import PackageError, UsageError
from turbofit.core.installation import install_command
from turbofit.core.process.progress import Step, tell
from turbofit.core.struct import JsonObject
from turbofit.core.units import format_bytes
from turbofit.model.folder import INDEX, FolderFiles, cached_snapshot
from turbofit.model.names import read_name
from turbofit.model.presets import HUB_ID, find_preset, load_preset
from turbofit.model.safetensors import LARGEST_INDEX, parse_index

#: torch's tensors by their names.
Tensors = dict[str, Any]
#: Takes a copy of a tensor, and returns the changed tensor.
Edit = Callable[[Any], Any]
_BIN_INDEX: Final = "pytorch_model.bin.index.json"
_HINT: Final = "download the file again, or check who made it"
_WEIGHTS: Final = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json",
)  # fmt: skip
#: Bytes of disk for the headers of weight files and for small text files.
_SLACK: Final = 1 << 20


class Piece(NamedTuple):
    """A tensor to write: its dtype in the result, and the edits to apply before writing."""

    tensor: Any
    dtype: Any
    edits: tuple[Edit, ...] = ()

    def made(self, name: str) -> Any:
        """Return an edited copy of the tensor.

        Raises:
            UsageError: the copy has values that are infinite or not a number.
        """
        torch = torch_library()
        result = self.tensor.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        for edit in self.edits:
            result = edit(result)
        if self.edits and not bool(torch.isfinite(result).all()):
            raise UsageError(
                f"{name} would have values that are no numbers: the adapter is broken, or"
                f" {dtype_name(self.dtype)} is too narrow for the sum",
                hint="take another checkpoint of the training, or a base in bfloat16",
            )
        return result


def piece(tensor: Any, dtype: Any, *edits: Edit) -> Piece:
    """Return a `Piece` for a tensor; floats get ``dtype``, other types keep theirs."""
    return Piece(tensor, dtype if tensor.is_floating_point() else tensor.dtype, edits)


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


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
            "reading and writing weights needs torch and safetensors: one of them is missing",
            hint=f"{install_command('merge')} (a CPU build of torch is enough)",
        ) from None


def open_weights(folder: str) -> dict[str, Tensors]:
    """Open a checkpoint's weight files; return the tensors of each file by their names.

    The files are sorted by name.

    Raises:
        UsageError: the folder holds no weights, or a file lacks a tensor of the index.
    """
    files, where = FolderFiles(folder), dict[str, str]()
    if headers := files.weights().tensors:
        where = {key: tensor.file for key, tensor in headers.items()}
    elif index := files.read(_BIN_INDEX, LARGEST_INDEX):
        where = parse_index(index, _BIN_INDEX, ".bin")
    names = sorted(set(where.values()) or fnmatch.filter(os.listdir(folder), "pytorch_model*.bin"))
    opened = {name: open_tensors(folder, name) for name in names}
    for key, name in where.items():
        if key not in opened[name]:
            raise UsageError(
                f"{_BIN_INDEX} names {key[:80]!r}, which {name} lacks",
                hint="download the checkpoint again",
            )
    if not opened:
        raise UsageError(
            f"{folder} holds no weights to merge into", hint="finish the checkpoint's download"
        )
    # A tensor that several files hold is read from the file that the index names.
    return {
        name: {key: tensor for key, tensor in tensors.items() if where.get(key, name) == name}
        for name, tensors in opened.items()
    }


def open_tensors(folder: str, name: str) -> Tensors:
    """Return the tensors in a file of safetensors' or torch's format, by name.

    Torch's files are pickles: ``weights_only`` lets no code in a pickle run.

    Raises:
        UsageError: the file is missing, or contains other objects than plain, named tensors.
    """
    torch, path = torch_library(), os.path.join(folder, name)
    if FolderFiles(folder).size(name) is None:
        raise UsageError(f"{name} is missing in {folder}", hint="finish the download")
    try:
        if name.endswith(".safetensors"):
            content = importlib.import_module("safetensors.torch").load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as exc:  # noqa: BLE001 - torch and pickle raise any type for a damaged file
        anew = "torch before 1.6 wrote another format: torch.save(torch.load(FILE), FILE)"
        raise UsageError(
            f"{name} cannot be read as weights alone: {str(exc)[:160]}", hint=f"{_HINT}; {anew}"
        ) from None
    for key, tensor in content.items() if isinstance(content, dict) else [("", None)]:
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise UsageError(f"{name} holds objects other than named tensors", hint=_HINT)
    return dict(content)


class Result(NamedTuple):
    """The content of the output folder: weight files, small text files, and files to copy."""

    files: Mapping[str, Mapping[str, Piece]]
    texts: Mapping[str, str]
    copies: list[str]
    architecture: str
    tower: str | None = None


def json_text(value: JsonObject) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def weight_files(files: Sequence[Mapping[str, Piece]]) -> dict[str, Mapping[str, Piece]]:
    """Name the output files in the usual way, such as model-00001-of-00002.safetensors."""
    count = len(files)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names if count > 1 else ["model.safetensors"], files, strict=True))


def copied_files(folder: str, written: Container[str], ends: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the files in a folder that a merge copies unchanged.

    A merge copies no weights, no hidden files, no files in ``written``, and no files whose names
    end in one of ``ends``.
    """
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file()
        and not entry.name.startswith(".")
        and not entry.name.endswith((*_WEIGHTS, *ends))
        and entry.name not in written
    )


def check_target(out: str, sources: tuple[str, ...]) -> str:
    """Return the real path of the output folder, which must be new and outside all sources.

    Raises:
        UsageError: the folder exists, or is in a source.
    """
    target = os.path.realpath(os.path.expanduser(out))
    inside = any(os.path.commonpath([target, it]) == it for it in map(os.path.realpath, sources))
    if inside or os.path.lexists(target):
        what = "is in a source" if inside else "exists"
        raise UsageError(f"{out} {what}", hint="name a new folder beside the sources")
    return target


def write(result: Result, folder: str, target: str) -> tuple[str, ...]:
    """Write the result into a temporary folder, which is renamed to ``target`` at the end.

    ``folder`` has the files to copy. The tensors of one file at a time are in RAM. After an error
    nothing remains. Return the names of the files.

    Raises:
        UsageError: the disk is too small, or a file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    source, files = FolderFiles(folder), result.files
    total, written = 0, 0
    for piece in chain.from_iterable(pieces.values() for pieces in files.values()):
        total += piece.tensor.numel() * piece.dtype.itemsize
    needed = total + sum(source.size(name) or 0 for name in result.copies) + _SLACK
    parent, name = os.path.split(target)
    if os.path.isdir(parent) and needed > (free := shutil.disk_usage(parent).free):
        raise UsageError(
            f"the result needs {format_bytes(needed)}, {parent} has {format_bytes(free)} left",
            hint="free some space, or write to another disk",
        )
    texts, temporary = dict(result.texts), os.path.join(parent, f".{name}.merge-{token_hex(8)}")
    try:
        os.mkdir(temporary)
        for name in result.copies:
            shutil.copyfile(os.path.join(folder, name), os.path.join(temporary, name))
        for number, (file, pieces) in enumerate(files.items(), 1):
            tensors, doing = {}, f"writing {file} ({number} of {len(files)})"
            for key, piece in pieces.items():
                tensors[key] = piece.made(key)
                written += tensors[key].nbytes
                tell(Step(doing, written, total, "bytes"))
            save_file(tensors, os.path.join(temporary, file), metadata={"format": "pt"})
        if len(files) > 1 or source.size(INDEX) is not None:
            where = {key: file for file, pieces in files.items() for key in pieces}
            index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(where.items()))}
            texts[INDEX] = json_text(index)
        for name, text in texts.items():
            Path(temporary, name).write_text(text, encoding="utf-8")
        os.rename(temporary, target)
    except (OSError, SafetensorError) as exc:
        raise UsageError(
            f"{target} cannot be written: {getattr(exc, 'strerror', None) or exc}",
            hint="choose a folder that you can write to, on a disk with room",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tuple(sorted({*files, *texts, *result.copies}))


def located(name: str, file: str, wanted: str = "") -> str:
    """Return the path of a folder, or of a hub id's snapshot in the local cache.

    Args:
        name: a folder, a hub id or a preset.
        file: the file that a snapshot must have.
        wanted: what the error's hint tells people to name, by default a folder with ``file``.

    Raises:
        UsageError: ``name`` is neither a folder nor in the local hub cache.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return os.path.abspath(path)
    hub_id, revision, _ = read_name(name)
    if preset := find_preset(hub_id):
        hub_id = load_preset(preset).hub_id
    if cached := cached_snapshot(hub_id, revision, file):
        return cached
    at = f" --revision {revision}" if revision else ""
    download = f"hf download {hub_id}{at}, or " if HUB_ID.fullmatch(hub_id) else ""
    raise UsageError(
        f"{name[:200]} is neither a folder nor in the local hub cache",
        hint=f"{download}name {wanted or f'a folder with {file}'}",
    )
