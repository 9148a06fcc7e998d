"""Reads checkpoints on this machine: a folder, or a snapshot in the hub cache."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.core.struct import T
from turbofit.core.version import REFERENCE
from turbofit.model.config import LARGEST_JSON
from turbofit.model.safetensors import (
    LARGEST_INDEX,
    PREFIX,
    Tensor,
    header_length,
    parse_header,
    parse_index,
)

if TYPE_CHECKING:
    from turbofit.model.checkpoint import Weights

#: Names of the main branch: ModelScope's own, and that of mirrored hubs.
_BRANCHES = ("master", "main")
#: The index file of a sharded checkpoint.
INDEX: Final = "model.safetensors.index.json"
_HINT: Final = "check the path and its permissions"
#: File types of weights that LMDeploy cannot read, each with its description.
_FOREIGN: Final = {
    ".gguf": "GGUF, which llama.cpp and Ollama read and LMDeploy does not",
    ".pth": f"the original format of Llama, which LMDeploy {REFERENCE} does not read",
}
#: File types that do not contain weights, and the commands that read them.
READ_ELSEWHERE: Final = {
    ".json": "turbofit serve --plan FILE starts a plan, and turbofit report FILE shows a plan",
    ".yaml": "a file of options is -f FILE, as turbofit plan -f FILE or turbofit serve -f FILE",
}
_HUB: Final = "name the safetensors checkpoint that it was made of, as a folder or a hub id"
_CHECKPOINT: Final = "name a checkpoint's folder in Hugging Face's format, or a hub id"
_BIN_ONLY: Final = (
    "the checkpoint is in torch's own format (.bin): sizes are computed from config.json, since "
    "turbofit reads only safetensors headers"
)


def cached_snapshot(hub_id: str, revision: str | None, holds: str = "config.json") -> str | None:
    """Return the folder of a hub id's snapshot in huggingface_hub's cache.

    Return None if the cache has no such folder, or if the folder lacks the file ``holds``.
    ``models--ORG--NAME/refs/REVISION`` names a commit, ``snapshots/COMMIT`` holds the files.
    """
    commit = wanted = revision or "main"
    if hub_id.count("/") != 1 or ".." in hub_id + wanted or not (hub_id + wanted).isprintable():
        return None
    base = os.path.join(hub_cache(), "models--" + hub_id.replace("/", "--"))
    try:
        with open(os.path.join(base, "refs", *wanted.split("/")), encoding="ascii") as file:
            commit = file.read(256).strip()
    except (OSError, ValueError):
        if revision is None:  # a given revision may itself be a commit
            return None
    if not commit.isalnum():
        return None
    folder = os.path.join(base, "snapshots", commit)
    return folder if os.path.isfile(os.path.join(folder, holds)) else None


def hub_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Return the folder of huggingface_hub's cache, by the rules of its ``constants.py``."""
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        home = environ.get("HF_HOME")
        if not home:
            caches = environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
            home = os.path.join(caches, "huggingface")
        cache = os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(cache))


def uses_modelscope() -> bool:
    """Return whether LMDeploy downloads from ModelScope, by LMDeploy's own test."""
    return os.environ.get("LMDEPLOY_USE_MODELSCOPE", "").lower() == "true"


def modelscope_cache() -> str:
    """Return the folder in which any version of the package modelscope keeps models."""
    root = os.environ.get("MODELSCOPE_CACHE") or os.path.join("~", ".cache", "modelscope")
    return os.path.expanduser(root)


def modelscope_folders(hub_id: str, revision: str | None) -> Iterator[str]:
    """Yield the folders of ModelScope's cache that hold a model, newest layout first.

    Each folder has a config.json. Since modelscope-hub 0.4 the layout is
    ``models/ORG--NAME/snapshots/REVISION``. Up to modelscope 1.37 the layout is ``ORG/NAME`` below
    the cache's root, ``hub``, ``models`` or ``hub/models``, for the main branch alone. Some
    versions write ``___`` for a dot in the name.
    """
    owner, _, name = hub_id.partition("/")
    parts = {owner, name, *(revision or "main").split("/")}
    if parts & {"", ".", ".."} or "/" in name or not "".join(parts).isprintable():
        return
    root = modelscope_cache()
    snapshots = os.path.join(root, "models", f"{owner}--{name}", "snapshots")
    for branch in (revision,) if revision else _BRANCHES:
        folder = os.path.join(snapshots, *branch.split("/"))
        if has_config(folder):
            yield folder
    masked = name.replace(".", "___")
    for above in ("models", os.path.join("hub", "models"), "hub", ""):
        for stored in dict.fromkeys((masked, name)):
            folder = os.path.join(root, above, owner, stored)
            if has_config(folder) and revision is None:
                yield folder


def cache_folders(hub_id: str, revision: str | None) -> Iterator[str]:
    """Yield a hub id's folders in the local caches, complete or not.

    The cache of the hub that is in use comes first.
    """
    snapshot = cached_snapshot(hub_id, revision)
    stored = [[snapshot] if snapshot else [], modelscope_folders(hub_id, revision)]
    yield from chain(*(reversed(stored) if uses_modelscope() else stored))


def is_path(name: str) -> bool:
    """Return whether the text can only be a path."""
    begins = ("/", "./", "../", "~", f".{os.sep}")
    is_path = name.startswith(begins) or name in {".", ".."} or "\0" in name or "\\" in name
    return is_path or bool(re.match(r"[A-Za-z]:/(?!/)", name))


def has_config(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))


class FolderFiles:
    """The files of one folder; symbolic links are followed, since the hub cache has links."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, name: str, limit: int = LARGEST_JSON + 1) -> bytes | None:
        """Read a file of up to ``limit`` bytes, as `Files.read` does.

        Raises:
            UsageError: the file cannot be read, or is too large.
        """
        size = self.size(name)
        if size is None:
            return None
        if size > limit:
            raise UsageError(f"{name} is larger than {limit >> 20} MiB", hint=_HINT)
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                return file.read(limit)
        except OSError as exc:
            raise UsageError(f"{name} cannot be read: {exc.strerror}", hint=_HINT) from None

    def size(self, name: str) -> int | None:
        """Return the size of a regular file in bytes; None if the file does not exist."""
        try:
            status = os.stat(os.path.join(self.path, name))
        except (OSError, ValueError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def weights(self) -> Weights:
        """Read the headers of the weight files that LMDeploy would choose."""
        from turbofit.model.checkpoint import Weights  # imported here, since presets do not need it

        index = self.read(INDEX, LARGEST_INDEX)
        if index is not None:
            return Weights(sharded(parse_index(index, INDEX), INDEX, self.header))
        # LMDeploy prefers model*.safetensors to pytorch_model*, and both to all other names.
        names = self.names()
        safe = [name for name in names if name.endswith(".safetensors")]
        torch = [name for name in names if name.endswith((".bin", ".pt"))]
        others = [] if any(name.startswith("pytorch_model") for name in torch) else safe
        if chosen := [name for name in safe if name.startswith("model")] or others:
            headers = map(self.header, chosen)
            return Weights({key: tensor for header in headers for key, tensor in header.items()})
        if torch:
            return Weights(None, _BIN_ONLY)
        return Weights(
            None,
            f"{self.path} holds no weights: sizes are computed from config.json, and LMDeploy will "
            "not start from this folder",
        )

    def names(self) -> list[str]:
        """Return the names of all files in the folder.

        Raises:
            UsageError: the folder cannot be read.
        """
        try:
            return sorted(os.listdir(self.path))
        except OSError as exc:
            raise UsageError(f"{self.path} cannot be read: {exc.strerror}", hint=_HINT) from None

    def header(self, name: str) -> dict[str, Tensor]:
        """Return the tensors in the header of a safetensors file, by name.

        Raises:
            UsageError: the file is missing, cannot be read, or is damaged.
        """
        size = self.size(name)
        if size is None:
            raise UsageError(f"{name} is missing in {self.path}", hint="finish the download")
        try:
            with open(os.path.join(self.path, name), "rb") as file:
                length = header_length(file.read(PREFIX), size, name)
                return parse_header(file.read(length), size, name)
        except OSError as exc:
            raise UsageError(f"{name} cannot be read: {exc.strerror}", hint=_HINT) from None


def sharded(
    where: dict[str, str],
    index: str,
    read: Callable[[str], dict[str, T]],
    hint: str = "download the checkpoint again",
) -> dict[str, T]:
    """Return the tensors that an index lists, by name, each from the file that the index names.

    Args:
        where: the name of each tensor's file, by the tensor's name.
        index: the name of the index, for the error.
        read: returns all tensors of a file by name.
        hint: the advice in the error.

    Raises:
        UsageError: a file lacks a tensor that the index says it has.
    """
    tensors: dict[str, T] = {}
    for file in sorted(set(where.values())):
        stored = read(file)
        tensors |= {name: stored[name] for name in stored if where.get(name) == file}
    if missing := where.keys() - tensors.keys():
        raise UsageError(
            f"{index} names {min(missing)[:80]!r}, which {where[min(missing)]} does not hold",
            hint=hint,
        )
    return tensors


def is_complete(folder: str) -> bool:
    """Return whether a snapshot contains all of its weights, not only the small files."""
    files = FolderFiles(folder)
    try:
        index = files.read(INDEX, LARGEST_INDEX)
        if index is not None:
            names = set(parse_index(index, INDEX).values())
            return all(files.size(name) is not None for name in names)
        return any(name.endswith((".safetensors", ".bin")) for name in files.names())
    except UsageError:
        return False


def no_checkpoint(path: str) -> UsageError:
    """Return the error that says why a file or a folder without config.json is no checkpoint."""
    is_folder, (folder, name) = os.path.isdir(path), os.path.split(path)
    names = FolderFiles(path).names() if is_folder else [name]
    ends = {os.path.splitext(name)[1].lower() for name in names}
    if foreign := next((why for end, why in _FOREIGN.items() if end in ends), None):
        return UsageError(f"{path} is no checkpoint that LMDeploy reads: {foreign}", hint=_HUB)
    if not is_folder:
        elsewhere = READ_ELSEWHERE.get(os.path.splitext(name)[1], _CHECKPOINT)
        hint = f"name its folder: {folder}" if has_config(folder) else elsewhere
        return UsageError(f"{path} is a file, not a checkpoint's folder", hint=hint)
    return UsageError(f"{path} has no config.json", hint=_CHECKPOINT)
