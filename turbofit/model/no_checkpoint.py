"""What a path that is there lacks of a checkpoint, and what to name instead."""

from __future__ import annotations

import os
from typing import Final

from turbofit.core.errors import UsageError

__all__ = ["no_checkpoint"]

#: Files of weights that LMDeploy does not read, and what they are.
_FOREIGN: Final = {
    ".gguf": "GGUF, which llama.cpp and Ollama read and LMDeploy does not",
    ".pth": "the original format of Llama, which LMDeploy 0.18 does not read",
}
_WEIGHTS: Final = (".safetensors", ".bin", ".pt")
_HUB: Final = "name the safetensors checkpoint that it was made of, as a folder or a hub id"
_CHECKPOINT: Final = "name a checkpoint's folder in Hugging Face's format, or a hub id"


def no_checkpoint(path: str) -> UsageError:
    """Why a file, or a folder without config.json, is no checkpoint.

    Args:
        path: absolute.
    """
    if not os.path.isdir(path):
        return _file(path)
    try:
        names = sorted(os.listdir(path))
    except OSError as exc:
        return UsageError(
            f"{path} cannot be read: {exc.strerror}", hint="check the path and its permissions"
        )
    inside = next((name for name in names if _has_config(os.path.join(path, name))), None)
    snapshots = os.path.join(path, "snapshots")
    if inside is None and os.path.isdir(snapshots):  # a model's folder in the hub cache
        revisions = sorted(os.listdir(snapshots))
        found = (name for name in revisions if _has_config(os.path.join(snapshots, name)))
        inside = next((os.path.join("snapshots", name) for name in found), None)
    if inside is not None:
        return UsageError(
            f"{path} has no config.json, but {inside} in it has",
            hint=f"name {os.path.join(path, inside)}",
        )
    foreign = next((why for end, why in _FOREIGN.items() if _ends(names, end)), None)
    if foreign is not None:
        return UsageError(f"{path} has no config.json, and its weights are {foreign}", hint=_HUB)
    if any(_ends(names, end) for end in _WEIGHTS):
        return UsageError(
            f"{path} holds weights, but no config.json",
            hint="put config.json and the tokenizer's files of the model's hub page beside them",
        )
    empty = "" if names else ": the folder is empty"
    return UsageError(f"{path} has no config.json{empty}", hint=_CHECKPOINT)


def _file(path: str) -> UsageError:
    """A file where a folder should be."""
    folder, name = os.path.split(path)
    for end, why in _FOREIGN.items():
        if name.lower().endswith(end):
            return UsageError(f"{path} is {why}", hint=_HUB)
    hint = f"name its folder: {folder}" if _has_config(folder) else _CHECKPOINT
    return UsageError(f"{path} is a file, not a checkpoint's folder", hint=hint)


def _ends(names: list[str], end: str) -> bool:
    return any(name.lower().endswith(end) for name in names)


def _has_config(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "config.json"))
