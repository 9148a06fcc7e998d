"""Reads the model of a name that is no preset: a folder, a hub id, or a path that is missing."""

from __future__ import annotations

import os
import re
from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, ModelSource
from turbofit.core.process.log import LazyLogger
from turbofit.machine.spec import is_spec
from turbofit.model.checkpoint import Weights, read_checkpoint
from turbofit.model.families.dims import named_refusal, purpose_refusal
from turbofit.model.folder import (
    READ_ELSEWHERE,
    FolderFiles,
    cache_folders,
    has_config,
    is_complete,
    is_path,
    no_checkpoint,
)
from turbofit.model.names import by_its_name, near_by_name, unrunnable
from turbofit.model.presets import (
    find_preset,
    load_preset,
    nearest_names,
    preset_model,
    sizes_of,
    unheeded,
)

_LOG: Final = LazyLogger(__name__)


def of_folder(path: str) -> Model:
    """Read the checkpoint in a folder; refuse adapters, and models that do not chat."""
    full = os.path.abspath(path)
    if os.path.isfile(os.path.join(path, "adapter_config.json")) and not any(
        name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin"))
        for name in os.listdir(path)
    ):  # LLaVA's adapters have a config.json too
        raise UsageError(
            f"{full} holds a LoRA adapter, not a model",
            hint="merge it: turbofit merge BASE ADAPTER OUT",
        )
    if not has_config(path):
        raise no_checkpoint(full)
    if refused := purpose_refusal(full):
        raise refused
    source = ModelSource(kind="folder", where=full, sizes="file", checkpoint=full)
    return read_checkpoint(FolderFiles(full), source)


def of_missing_path(path: str, stored: str | None) -> Model:
    """Return the model that a missing path's last part names: a preset, or a fine-tune of one.

    Commands keep the path. Any other path is refused.
    """
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    preset = find_preset(last)
    if preset is None:
        return _fine_tune_by_path(path, last, stored)
    warning = f"no folder {path[:160]} is here, so it is planned by its name as {preset}"
    # The commands of the plan keep the path: the preset's checkpoint is another one.
    return replace(preset_model(preset, warnings=(warning,)), hub_id=path)


def _fine_tune_by_path(path: str, last: str, stored: str | None) -> Model:
    """Return the model of a missing folder with a preset's name and an end such as -MPO.

    Raises:
        UsageError: the last part of the path has another name; the hint may name a similar preset.
    """
    if refused := named_refusal(path) or unrunnable(path, stored):
        raise refused
    if elsewhere := READ_ELSEWHERE.get(os.path.splitext(path)[1]):
        raise UsageError(f"{path[:160]!r} is no model", hint=elsewhere + near_by_name(path))
    # Such a text is neither a path nor a hub id.
    if not is_path(path) and ("/" not in path or " " in path):
        hint = f"it is a machine: --on {path}" if is_spec(path) else _nearest_hint(path)
        raise UsageError(f"no model is known as {path[:80]!r}", hint=hint)
    unread = f"no folder {path[:160]} is here, so its name alone was read"
    read = by_its_name(last, unread, guess=True, model_format=stored)
    if isinstance(read, str):
        raise no_folder(path)
    return replace(read, hub_id=path)


def of_hub_id(name: str, revision: str | None, preset: str | None, stored: str | None) -> Model:
    """Return the model of a hub id: from a cache, the hub, or ``preset``, which the id means.

    ``stored`` is the given ``--model-format``.

    Raises:
        UsageError: nobody has this model, or turbofit has no account of it.
    """
    if preset is not None and load_preset(preset).hub_id.lower() == name.lower():
        name = load_preset(preset).hub_id  # in the hub's own upper and lower case
    if preset is None and (refused := purpose_refusal(name)):
        raise refused
    if found := cached(name, revision):
        return found
    # Only here: it loads what speaks HTTP.
    from turbofit.model.hub import HubUnreachableError, NotGivenError, files_of

    try:
        files = files_of(name, revision)
        if files.read("config.json") is None:
            raise NotGivenError(f"{files.where} has no config.json", hint=_nearest_hint(name))
        source = ModelSource(kind="hub", where=files.where, sizes="file")
        return read_checkpoint(files, source, name)
    except HubUnreachableError as reason:
        guesses = not isinstance(reason, NotGivenError)
        return _without_hub(name, revision, preset, stored, reason, guesses=guesses)


def cached(hub_id: str, revision: str | None) -> Model | None:
    """Return the checkpoint in a local cache; None if no cache has all of it."""
    for folder in cache_folders(hub_id, revision):
        if is_complete(folder):
            return _snapshot(hub_id, folder)
        _LOG.info("%s is in the local cache without all of its weights: %s", hub_id, folder)
    return None


def _snapshot(hub_id: str, folder: str, *, config_only: bool = False) -> Model:
    """Read a hub id's folder in a local cache; with ``config_only``, without its weights."""
    checkpoint = None if config_only else folder
    source = ModelSource(kind="hub_cache", where=folder, sizes="file", checkpoint=checkpoint)
    no_weights = Weights(
        None,
        "the hub cache holds the config of this model but not its weights: sizes are computed from"
        " the config",
    )
    weights = no_weights if config_only else None
    return read_checkpoint(FolderFiles(folder), source, hub_id, weights=weights)


def _without_hub(
    hub_id: str,
    revision: str | None,
    preset: str | None,
    stored: str | None,
    reason: UsageError,
    *,
    guesses: bool,
) -> Model:
    """Return a hub id's model from a cache or a preset; a warning states the ``reason``.

    ``guesses``: the hub has not answered, so the name alone may tell the model.
    """
    _LOG.info("%s is read without the hub: %s", hub_id, reason.message)
    folder = next(cache_folders(hub_id, revision), None)
    if folder:
        known = _snapshot(hub_id, folder, config_only=True)
        return replace(known, warnings=(reason.message, *known.warnings))
    if preset:
        warning = f"{reason.message}: the preset {preset} is used instead"
        # A launch downloads the given hub id; the preset's hub id may have another owner.
        warnings = (warning, *unheeded(revision))
        return replace(preset_model(preset, warnings=warnings), hub_id=hub_id)
    if refused := named_refusal(hub_id) or unrunnable(hub_id, stored):
        raise refused
    unread = f"{reason.message}; no folder {hub_id} is here"
    guess = by_its_name(hub_id, unread, guess=guesses, model_format=stored)
    if isinstance(guess, str):
        raise type(reason)(unread, hint=reason.hint + guess)
    return replace(guess, warnings=(*guess.warnings, *unheeded(revision)))


def no_folder(path: str) -> UsageError:
    hint = f"name a checkpoint's folder or hub id{near_by_name(path)}"
    return UsageError(f"no folder {path[:160]!r} is here", hint=hint)


def _nearest_hint(name: str) -> str:
    """Return the hint for an unknown name: similar presets, or the forms that a name may have."""
    # Ollama writes a colon before the size.
    near = nearest_names(name.replace(":", "-")) if re.fullmatch(r"[\w./@:-]+", name) else []
    if near:
        more = "" if sizes_of(name) else f" `turbofit models {name}` lists more"
        return f"did you mean {', '.join(near)}?{more}"
    return "name a folder, a hub id (ORG/NAME) or one of `turbofit models`"
