"""Finds the model for a typed name: in a folder, the hub cache, the hub, or the presets.

If LMDEPLOY_USE_MODELSCOPE is set, ModelScope is the hub, and its cache is searched first, as in
LMDeploy.

A preset's alias causes no network access: it means the checkpoint in the hub cache, if that
checkpoint is complete, else the preset. A hub id is looked up on the hub, unless the environment
forbids it. If the look-up fails, the cache or a preset is used, and a warning says so.
"""

from __future__ import annotations

import os
from typing import Final, Literal, NamedTuple

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Model
from turbofit.core.process.log import LazyLogger
from turbofit.model.folder import cache_folders, has_config, is_path
from turbofit.model.presets import HUB_ID, find_preset, load_preset, preset_model, unheeded

_LOG: Final = LazyLogger(__name__)


class _Typed(NamedTuple):
    """A typed name, as it is read once.

    ``text`` is a path, a preset's name or a hub id, by ``kind``. ``preset`` is the preset that the
    name means, if there is one. ``notes`` tell how the name was read.
    """

    kind: Literal["folder", "missing path", "preset", "hub id", "unknown"]
    text: str
    revision: str | None
    preset: str | None = None
    notes: tuple[str, ...] = ()


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
    typed = _read(name, revision)
    found = _find_model(typed, model_format)
    model = replace(found, revision=typed.revision, warnings=(*typed.notes, *found.warnings))
    _LOG.info(
        "model %s: %s from %s, sizes by %s",
        name, model.architecture, model.source.where, model.source.sizes,
    )  # fmt: skip
    return model


def _read(name: str, revision: str | None) -> _Typed:
    """Read what a typed name is: a folder, a missing path, a preset's name or a hub id.

    Raises:
        UsageError: the name is empty, an address of no model, or of another revision.
    """
    if not name.strip():
        raise UsageError("the model has no name", hint="name a checkpoint's folder or hub id")
    path, preset = os.path.expanduser(name), find_preset(name)
    if "\0" not in name and os.path.exists(path):
        if preset is None or is_path(name) or has_config(path) or HUB_ID.fullmatch(name):
            return _Typed("folder", path, revision)
        # A preset's name wins over a folder of this name without a config.
        return _Typed("preset", name, revision, preset)
    if is_path(name):
        return _Typed("missing path", path, revision)
    if preset is not None and "/" not in name:
        return _Typed("preset", name, revision, preset)
    from turbofit.model.names import read_name  # a preset is found without it

    text, revision, notes = read_name(name, revision)
    if _is_relative(name, text, preset):
        return _Typed("missing path", path, revision)
    preset = preset or find_preset(text)
    if HUB_ID.fullmatch(text):
        return _Typed("hub id", text, revision, preset, notes)
    return _Typed("unknown" if preset is None else "preset", text, revision, preset, notes)


def _is_relative(name: str, text: str, preset: str | None) -> bool:
    """Return whether a name that is no folder here can only be a relative path.

    ``models/NAME`` has the form of a hub id; it is a path where a folder ``models`` is here.
    ``text`` is the hub id that was read in the name, if there is one.
    """
    if HUB_ID.fullmatch(text):
        return text == name and os.path.isdir(name.partition("/")[0])
    return preset is None and "/" in name and ":" not in name


def _find_model(typed: _Typed, stored: str | None) -> Model:
    """Return the model of a name that was read; ``stored`` is the given ``--model-format``."""
    preset = typed.preset
    if typed.kind == "preset" and preset is not None:
        return _of_preset(preset, typed.revision)
    from turbofit.model import reading  # a preset needs no reader of checkpoints

    if typed.kind == "folder":
        return reading.of_folder(typed.text)
    if typed.kind == "hub id":
        return reading.of_hub_id(typed.text, typed.revision, preset, stored)
    return reading.of_missing_path(typed.text, stored)


def _of_preset(preset: str, revision: str | None) -> Model:
    """Return the preset's checkpoint in a local cache, if all of it is there, or the preset."""
    hub_id = load_preset(preset).hub_id
    if any(cache_folders(hub_id, revision)):
        from turbofit.model.reading import cached

        if found := cached(hub_id, revision):
            return found
    return preset_model(preset, warnings=unheeded(revision))


def refuse_missing_folder(name: str | Model) -> None:
    """Refuse a missing path; a plan may read a missing path as a preset, a launch may not.

    Raises:
        UsageError: the text is a path, and the path does not exist.
    """
    if isinstance(name, str) and _read(name, None).kind == "missing path":
        from turbofit.model.reading import no_folder

        raise no_folder(os.path.expanduser(name))
