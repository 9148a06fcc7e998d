"""Finds the model for a typed name: in a folder, the hub cache, the hub, or the presets.

If LMDEPLOY_USE_MODELSCOPE is set, ModelScope is the hub, and its cache is searched first, as in
LMDeploy.

A preset's alias causes no network access: it means the checkpoint in the hub cache, if that
checkpoint is complete, else the preset. A hub id is looked up on the hub, unless the environment
forbids it. If the look-up fails, the cache or a preset is used, and a warning says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain
from typing import Final

from turbofit.core.errors import UsageError
from turbofit.core.model import Model, ModelSource
from turbofit.core.process.log import LazyLogger
from turbofit.model.folder import cached_snapshot, has_config, modelscope_folders, uses_modelscope
from turbofit.model.presets import (
    HUB_ID,
    find_preset,
    load_preset,
    nearest_names,
    preset_model,
    sizes_of,
)

_LOG: Final = LazyLogger(__name__)


def resolve_model(
    name: str, *, revision: str | None = None, model_format: str | None = None
) -> Model:
    """Return the model for a typed name.

    Args:
        name: a folder, a hub id (``OpenGVLab/InternVL2-8B``), its address, or a preset
            (``internvl2-8b``).
        revision: branch, tag or commit on the hub.
        model_format: how the weights are stored, if the name does not tell it.

    Raises:
        UsageError: no such model, a damaged checkpoint, or one that has no account.
    """
    model = _find_model(name, revision, model_format)
    _LOG.info(
        "model %s: %s from %s, sizes by %s",
        name, model.architecture, model.source.where, model.source.sizes,
    )  # fmt: skip
    return model


def _find_model(name: str, revision: str | None, stored: str | None) -> Model:
    """Return the model of a folder, a missing path, a preset's name, a hub id or an address."""
    path = os.path.expanduser(name)
    exists = bool(name) and "\0" not in name and os.path.exists(path)
    if exists and (_is_path(name) or has_config(path) or HUB_ID.fullmatch(name)):
        return _folder(path)
    if not name.strip():
        raise UsageError("the model has no name", hint="name a checkpoint's folder or hub id")
    if _is_missing_path(name):
        return _by_missing_path(path, stored)
    # A preset's name wins over a folder of this name without a config.
    if find_preset(name) is not None:
        return _by_name(name, revision, stored)
    if exists:
        return _folder(path)
    from msgspec.structs import replace

    from turbofit.model.names import read_name

    name, revision, notes = read_name(name, revision)
    model = _by_name(name, revision, stored)
    return replace(model, revision=revision, warnings=(*notes, *model.warnings))


def refuse_missing_folder(name: str | Model) -> None:
    """Refuse a missing path; a plan may read a missing path as a preset, a launch may not.

    Raises:
        UsageError: the text is a path, and the path does not exist.
    """
    if isinstance(name, str) and _is_missing_path(name):
        raise _no_folder(os.path.expanduser(name))


def _is_missing_path(name: str) -> bool:
    """Return whether a text is a path that does not exist.

    ``models/NAME`` has the form of a hub id; it is a path where a folder ``models`` is here.
    """
    if "\0" not in name and os.path.exists(os.path.expanduser(name)):
        return False
    if _is_path(name) or "/" not in name:
        return _is_path(name)
    from turbofit.model.names import read_name

    read = read_name(name).text
    if HUB_ID.fullmatch(read):
        return read == name and os.path.isdir(name.partition("/")[0])
    return find_preset(name) is None and ":" not in name


def _by_missing_path(path: str, stored: str | None) -> Model:
    """Return the model that a missing path's last part names: a preset, or a fine-tune of one.

    Commands keep the path. Any other path is refused.
    """
    from msgspec.structs import replace

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
    from msgspec.structs import replace

    from turbofit.machine.spec import is_spec
    from turbofit.model.families.dims import named_refusal
    from turbofit.model.folder import READ_ELSEWHERE
    from turbofit.model.names import by_its_name, near_by_name, unrunnable

    if refused := named_refusal(path) or unrunnable(path, stored):
        raise refused
    if elsewhere := READ_ELSEWHERE.get(os.path.splitext(path)[1]):
        raise UsageError(f"{path[:160]!r} is no model", hint=elsewhere + near_by_name(path))
    # Such a text is neither a path nor a hub id.
    if not _is_path(path) and ("/" not in path or " " in path):
        hint = f"it is a machine: --on {path}" if is_spec(path) else _nearest_hint(path)
        raise UsageError(f"no model is known as {path[:80]!r}", hint=hint)
    unread = f"no folder {path[:160]} is here, so its name alone was read"
    read = by_its_name(last, unread, guess=True, model_format=stored)
    if isinstance(read, str):
        raise _no_folder(path)
    return replace(read, hub_id=path)


def _by_name(name: str, revision: str | None, stored: str | None) -> Model:
    """Return the model of a preset's name or hub id: from a cache, the hub, or a preset."""
    preset = find_preset(name)
    if not HUB_ID.fullmatch(name):
        if preset is None:
            return _by_missing_path(name, stored)
        cached = _cached(load_preset(preset).hub_id, revision)
        return cached or preset_model(preset, warnings=_unheeded(revision))
    if preset and load_preset(preset).hub_id.lower() == name.lower():
        name = load_preset(preset).hub_id  # in the hub's own upper and lower case
    if preset is None:
        from turbofit.model.families.dims import purpose_refusal

        if refused := purpose_refusal(name):
            raise refused
    cached = _cached(name, revision)
    if cached:
        return cached
    from turbofit.model.hub import (
        HubFiles,
        HubUnreachableError,
        ModelScopeFiles,
        NotGivenError,
        is_offline,
    )

    if is_offline():
        reason = HubUnreachableError(
            f"{name} is not in the local hub cache, and the environment forbids the network",
            hint="download it first, or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
        )
        return _without_hub(name, revision, preset, stored, reason)
    from turbofit.model.checkpoint import read_checkpoint

    try:
        files = (ModelScopeFiles if uses_modelscope() else HubFiles)(name, revision)
        if files.read("config.json") is None:
            raise NotGivenError(f"{files.where} has no config.json", hint=_nearest_hint(name))
        source = ModelSource(kind="hub", where=files.where, sizes="file")
        return read_checkpoint(files, source, name)
    except HubUnreachableError as reason:
        return _without_hub(name, revision, preset, stored, reason)


def _is_path(name: str) -> bool:
    """Return whether the text can only be a path."""
    begins = ("/", "./", "../", "~", f".{os.sep}")
    is_path = name.startswith(begins) or name in {".", ".."} or "\0" in name or "\\" in name
    return is_path or bool(re.match(r"[A-Za-z]:/(?!/)", name))


def _folder(path: str) -> Model:
    """Read the checkpoint in a folder; refuse adapters, and models that do not chat."""
    from turbofit.model.checkpoint import read_checkpoint
    from turbofit.model.folder import FolderFiles, no_checkpoint

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
    from turbofit.model.families.dims import purpose_refusal

    if refused := purpose_refusal(full):
        raise refused
    source = ModelSource(kind="folder", where=full, sizes="file", checkpoint=full)
    return read_checkpoint(FolderFiles(full), source)


def _folders(hub_id: str, revision: str | None) -> Iterator[str]:
    """Yield a hub id's folders in the local caches, complete or not.

    The cache of the hub that is in use comes first.
    """
    snapshot = cached_snapshot(hub_id, revision)
    stored = [[snapshot] if snapshot else [], modelscope_folders(hub_id, revision)]
    yield from chain(*(reversed(stored) if uses_modelscope() else stored))


def _cached(hub_id: str, revision: str | None) -> Model | None:
    """Return the checkpoint in a local cache; None if no cache has all of it."""
    for folder in _folders(hub_id, revision):
        from turbofit.model.folder import is_complete

        if is_complete(folder):
            return _snapshot(hub_id, folder)
        _LOG.info("%s is in the local cache without all of its weights: %s", hub_id, folder)
    return None


def _snapshot(hub_id: str, folder: str, *, config_only: bool = False) -> Model:
    """Read a hub id's folder in a local cache; with ``config_only``, without its weights."""
    from turbofit.model.checkpoint import Weights, read_checkpoint
    from turbofit.model.folder import FolderFiles

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
    hub_id: str, revision: str | None, preset: str | None, stored: str | None, reason: UsageError
) -> Model:
    """Return a hub id's model from a cache or a preset; a warning states the ``reason``."""
    from msgspec.structs import replace

    _LOG.info("%s is read without the hub: %s", hub_id, reason.message)
    folder = next(_folders(hub_id, revision), None)
    if folder:
        known = _snapshot(hub_id, folder, config_only=True)
        return replace(known, warnings=(reason.message, *known.warnings))
    if preset:
        warning = f"{reason.message}: the preset {preset} is used instead"
        # A launch downloads the given hub id; the preset's hub id may have another owner.
        return replace(
            preset_model(preset, warnings=(warning, *_unheeded(revision))), hub_id=hub_id
        )
    from turbofit.model.families.dims import named_refusal
    from turbofit.model.hub import NotGivenError
    from turbofit.model.names import by_its_name, unrunnable

    if refused := named_refusal(hub_id) or unrunnable(hub_id, stored):
        raise refused
    unread = f"{reason.message}; no folder {hub_id} is here"
    answered = isinstance(reason, NotGivenError)
    guess = by_its_name(hub_id, unread, guess=not answered, model_format=stored)
    if isinstance(guess, str):
        raise type(reason)(unread, hint=reason.hint + guess)
    return replace(guess, warnings=(*guess.warnings, *_unheeded(revision)))


def _unheeded(revision: str | None) -> tuple[str, ...]:
    """Return the warning that a preset describes another revision than the given one."""
    if revision is None:
        return ()
    return (f"a preset describes the main revision; the revision {revision!r} was not read",)


def _no_folder(path: str) -> UsageError:
    from turbofit.model.names import near_by_name

    hint = f"name a checkpoint's folder or hub id{near_by_name(path)}"
    return UsageError(f"no folder {path[:160]!r} is here", hint=hint)


def _nearest_hint(name: str) -> str:
    """Return the hint for an unknown name: similar presets, or the forms that a name may have."""
    near = nearest_names(name) if re.fullmatch(r"[\w./@:-]+", name) else []
    if near:
        more = "" if sizes_of(name) else f" `turbofit models {name}` lists more"
        return f"did you mean {', '.join(near)}?{more}"
    return "name a folder, a hub id (ORG/NAME) or one of `turbofit models`"
