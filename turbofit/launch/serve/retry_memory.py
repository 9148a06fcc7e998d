"""What the ladder learned, kept for the next start: by model, GPUs and LMDeploy's version."""

from __future__ import annotations

import hashlib
import json
import time
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError
from turbofit.core.process.files import write_atomic
from turbofit.core.process.state import state_dir

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.json_types import Options
    from turbofit.core.plan import Plan

__all__ = ["forget", "recall", "remember"]

_SCHEMA: Final = "turbofit.learned/1"


def recall(plan: Plan, lmdeploy: str, *, pretend: bool) -> Options:
    """Keywords of the planner that made the last start of this kind work; empty where none did."""
    try:
        document = json.loads(_path(plan, lmdeploy, pretend).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        return {}
    changes = document.get("changes")
    return dict(changes) if isinstance(changes, dict) else {}


def remember(plan: Plan, lmdeploy: str, *, pretend: bool, changes: Options, why: list[str]) -> None:
    """Keep what helped. A folder that cannot be written costs the memory, not the server."""
    document = {
        "schema": _SCHEMA,
        "model": plan.model.hub_id or plan.model.name,
        "gpus": _cards(plan),
        "lmdeploy": lmdeploy,
        "pretend": pretend,
        "changes": changes,
        "why": why,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        path = _path(plan, lmdeploy, pretend)
        write_atomic(path, json.dumps(document, indent=2) + "\n", mode=0o600)
    except (OSError, UsageError):
        return


def forget(plan: Plan, lmdeploy: str, *, pretend: bool) -> bool:
    """Drop it; whether there was anything."""
    try:
        _path(plan, lmdeploy, pretend).unlink()
    except OSError:
        return False
    return True


def _path(plan: Plan, lmdeploy: str, pretend: bool) -> Path:
    """One file for each kind of start.

    Raises:
        OSError: the state folder cannot be made.
    """
    model = plan.model.hub_id or plan.model.name
    key = [model, plan.model.source.checkpoint or "", *_cards(plan), lmdeploy, str(pretend)]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    return state_dir("learned") / f"{digest}.json"


def _cards(plan: Plan) -> list[str]:
    """The visible GPUs' names, counted: a plan may use fewer of them after a rung."""
    return sorted(plan.machine.gpu(index).name for index in plan.machine.visible)
