"""Makes an overlay: a folder of links to a model's files, with the plan's default image limit.

Only config files that contain the limit are copied and edited.

LMDeploy reads the default image limit from the model folder. So a request without a limit of its
own keeps the plan's limit. The overlay keeps the name of the model folder, since LMDeploy chooses
chat templates by this name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.images import ImageRule
from turbofit.core.images.rule import FolderEdits
from turbofit.core.plan import Plan
from turbofit.core.promise import Limits
from turbofit.core.struct import JsonObject
from turbofit.model.config import parse_json

_CONFIG: Final = "config.json"
_PREPROCESSOR: Final = "preprocessor_config.json"
#: Transformers 5 may keep the image processor in this file, and then reads no other file.
_PROCESSOR: Final = "processor_config.json"
_NESTED: Final = "image_processor"


def edits(folder: Path, rule: ImageRule, limits: Limits) -> dict[str, JsonObject]:
    """Return the new content of each file of a checkpoint that must change, by file name.

    A file must change if it contains a default limit that is not the plan's.
    """
    limit = limits.image_limit
    if limit is None or limit == rule.checkpoint_limit:
        return {}
    values = rule.folder_edits(limit)
    changed = {_CONFIG: {**_read(folder / _CONFIG), **values.config}} if values.config else {}
    return changed | (_processor_edits(folder, values) if values.processor else {})


def make_overlay(plan: Plan, root: Path) -> Path:
    """Make the folder below ``root`` that LMDeploy gets in place of the checkpoint.

    Return the new folder, or the checkpoint itself if its own default is the plan's limit. Files
    from an earlier call stay unchanged, since engines may read these files.

    Raises:
        UsageError: the checkpoint is not on this machine.
        LaunchError: the folder cannot be made.
    """
    where = plan.model.source.checkpoint
    if where is None or not os.path.isdir(where):
        raise UsageError(
            f"the checkpoint of {plan.model.name} is not on this machine",
            hint="download it first (hf download ID), and plan with its folder",
        )
    folder, rule = Path(where), plan.model.image_rule
    changed = (
        edits(folder, rule, plan.promise.limits) if rule and plan.promise.limits.vision_unit else {}
    )
    parts = folder.absolute().parts
    # The path of the overlay ends like the checkpoint's path: with the same last part, or with the
    # same three last parts for a hub cache.
    kept = parts[-3:] if len(parts) > 3 and parts[-2] == "snapshots" else parts[-1:]
    return _build(folder, root / Path(*kept), changed) if changed else folder


def _build(folder: Path, target: Path, changed: dict[str, dict[str, Any]]) -> Path:
    try:
        target.mkdir(parents=True, exist_ok=True)
        existing = set(os.listdir(target))
        for entry in folder.absolute().iterdir():
            if entry.name not in changed and entry.name not in existing:
                # A link to the file itself: in a hub cache ``entry`` is a link, which may vanish.
                (target / entry.name).symlink_to(entry.resolve())
        for name in changed.keys() - existing:
            text = json.dumps(changed[name], indent=2, ensure_ascii=False)
            (target / name).write_text(text + "\n", encoding="utf-8")
    except OSError as exc:
        raise LaunchError(
            f"the overlay of the model folder cannot be made: {exc.strerror or exc}",
            hint="set XDG_STATE_HOME to a writable folder on a file system with symbolic links",
        ) from None
    return target


def _processor_edits(folder: Path, edited: FolderEdits) -> dict[str, dict[str, Any]]:
    """Return the new content of the processor's files, by file name."""
    changed: dict[str, dict[str, Any]] = {}
    whole = _read(folder / _PROCESSOR) if (folder / _PROCESSOR).exists() else {}
    nested = whole.get(_NESTED)
    if isinstance(nested, dict):
        changed[_PROCESSOR] = {**whole, _NESTED: _edited(nested, edited)}
    standalone = _read(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).exists() else {}
    if standalone or not changed:
        changed[_PREPROCESSOR] = _edited(standalone, edited)
    return changed


def _edited(values: dict[str, Any], edited: FolderEdits) -> dict[str, Any]:
    """Return the content of a processor's file with the plan's values.

    The values may stand in an object of the file, which ``edited.inside`` names.
    """
    if not edited.inside:
        return {**values, **edited.processor}
    within = values.get(edited.inside)
    kept = within if isinstance(within, dict) else {}
    return {**values, edited.inside: {**kept, **edited.processor}}


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes(), str(path)).values
    except OSError as exc:
        raise UsageError(
            f"{path} cannot be read: {exc}", hint="download the checkpoint again"
        ) from None
