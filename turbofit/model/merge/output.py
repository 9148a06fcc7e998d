"""The folder that a merge writes: there as a whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Final, NamedTuple

from turbofit.core.errors import UsageError
from turbofit.core.json_types import JsonObject
from turbofit.core.process.files import sync_folder
from turbofit.core.process.progress import Step, tell
from turbofit.core.units import format_bytes
from turbofit.model.caches import cached_snapshot
from turbofit.model.folder import INDEX, FolderFiles
from turbofit.model.merge.tensors import Piece, write_tensors
from turbofit.model.names import read_name
from turbofit.model.presets import HUB_ID, find_preset, load_preset

_WEIGHTS: Final = (
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json",
)  # fmt: skip
_SLACK: Final = 1 << 20


class Result(NamedTuple):
    """What is to be written: weight files, small files as text, and files to copy."""

    files: Mapping[str, list[Piece]]
    texts: Mapping[str, str]
    copies: list[str]
    architecture: str
    tower: str | None = None


def _size(*files: list[Piece]) -> int:
    return sum(piece.bytes for pieces in files for piece in pieces)


def json_text(value: JsonObject) -> str:
    """A small file's text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def weight_files(base: Iterable[str], files: Sequence[list[Piece]]) -> dict[str, list[Piece]]:
    """Files by their names: the base's, where these are safetensors and no file joins them."""
    names, count = list(base), len(files)
    if len(names) != count or not all(name.endswith(".safetensors") for name in names):
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        names = names if count > 1 else ["model.safetensors"]
    return dict(zip(names, files, strict=True))


def copied_files(folder: str, written: Container[str], ends: tuple[str, ...] = ()) -> list[str]:
    """What goes along unchanged: files of the folder itself that are no weights.

    Left out are those that are written anew, and those whose names end so.
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
    """The real path of the folder to write.

    Raises:
        UsageError: it is a source, holds one or lies in one, is no folder, is a mount point, or is
            not empty and ``force`` is not given.
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
    """Write everything into a folder beside the target, which takes its place at the end.

    Returns:
        The names of the files.

    Raises:
        UsageError: no room, or the folder cannot be written; nothing is left behind then.
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

    def done(size: int) -> None:
        nonlocal written
        written += size
        tell(Step("writing", written, total, "bytes"))

    for number, (name, pieces) in enumerate(result.files.items(), 1):
        changed = sum(bool(piece.edits) for piece in pieces)
        say(
            f"writing {name} ({number} of {len(result.files)}): {format_bytes(_size(pieces))},"
            f" {len(pieces)} tensors, {changed} changed"
        )
        write_tensors(os.path.join(to, name), pieces, done)
    for name in (*result.copies, *texts, *result.files):
        with open(os.path.join(to, name), "rb") as file:
            os.fsync(file.fileno())


def _replace(temporary: str, target: str) -> None:
    """Put the new folder in place; what was there is kept until it is."""
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
    """A folder, or a snapshot in the local hub cache that has this file.

    Raises:
        UsageError: it is neither; ``wanted`` is what can be named instead.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return os.path.abspath(path)
    hub_id, revision, notes = read_name(name)
    if preset := find_preset(hub_id):
        hub_id = load_preset(preset).hub_id
    for note in notes:
        say(note)
    if cached := cached_snapshot(hub_id, revision, file):
        return cached
    at = f" --revision {revision}" if revision else ""
    download = f"hf download {hub_id}{at}, or " if HUB_ID.fullmatch(hub_id) else ""
    raise UsageError(
        f"{name[:200]} is neither a folder nor in the local hub cache",
        hint=f"{download}name {wanted or f'a folder with {file}'}",
    )
