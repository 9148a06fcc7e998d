"""The run's record: ``run.json`` in the run's folder, whole after every change."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.files import write_atomic
from turbofit.core.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from turbofit.core.plan import Plan

__all__ = ["Record", "run_folder", "state_folder"]

_SCHEMA: Final = "turbofit.run/1"


class Record:
    """What happened, as a document.

    Args:
        folder: the run's own.
        facts: of the whole run.
    """

    def __init__(self, folder: Path, **facts: Any) -> None:
        self.folder = folder
        self.document: dict[str, Any] = {
            "schema": _SCHEMA,
            "turbofit_version": __version__,
            "pid": os.getpid(),
            "started": _now(),
            "state": "starting",
            **facts,
            "attempts": [],
            "events": [],
        }
        self.write()

    def begin(self, **facts: Any) -> None:
        """A new attempt with its own settings."""
        self.document["attempts"].append({"started": _now(), **facts})
        self.write()

    def attempt(self, **facts: Any) -> None:
        """More of the current attempt."""
        self.document["attempts"][-1].update(facts)
        self.write()

    def event(self, kind: str, text: str) -> None:
        """Something that happened; the last thousand are kept."""
        events = self.document["events"]
        events.append({"at": _now(), "kind": kind, "text": text})
        del events[:-1000]
        self.write()

    def state(self, state: str, **facts: Any) -> None:
        """Where the run stands."""
        self.document.update(state=state, **facts)
        self.write()

    def write(self) -> None:
        """Keep it; a full disk costs the record, never the server."""
        try:
            text = json.dumps(self.document, indent=1, ensure_ascii=False) + "\n"
            write_atomic(self.folder / "run.json", text, mode=0o600)
        except (UsageError, OSError):
            return


def state_folder(room: str, name: str) -> Path:
    """A new folder in a room of the state folder, named after a model.

    Raises:
        LaunchError: it cannot be made.
    """
    from turbofit.core.state import new_folder

    try:
        return new_folder(room, "".join(c if c.isalnum() else "-" for c in name))
    except OSError as exc:
        raise _unwritable(exc) from None


def run_folder(plan: Plan) -> Path:
    """A folder of the state folder for this run, with its plan.

    Raises:
        LaunchError: it cannot be made.
    """
    folder = state_folder("runs", plan.model.name)
    try:
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    except OSError as exc:
        raise _unwritable(exc) from None
    return folder


def _unwritable(exc: OSError) -> LaunchError:
    return LaunchError(
        f"the state folder cannot be written: {exc.strerror or exc}",
        hint="set XDG_STATE_HOME to a folder that can",
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
