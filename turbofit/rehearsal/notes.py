"""The report that a rehearsal's child writes for its parent: a JSON file, replaced at each note.

The report contains no memory sizes; the parent reads those by the engine's `RehearsedEngine`.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from turbofit.core.struct import Document

_NAME: Final = "report.json"
#: The status of a request that did not end in time.
NOT_FINISHED: Final = "not finished"
#: Statuses of a request which show that the engine answers no request any more.
DEAD: Final = frozenset({"unavailable", "internal_error"})


class Notes:
    """Writes the report of a rehearsal's child into a file of the rehearsal's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start = time.monotonic()
        #: Called to begin a phase in the processes of the engine.
        self.begin: Callable[[str], None] = lambda _: None
        self.phase = "import"
        #: Objects that must live until the process ends: their memory belongs to the last phase.
        self.alive: list[object] = []
        self.data: dict[str, Any] = {"pid": os.getpid(), "seconds": {}, "cases": []}
        self.write()

    def write(self, **values: Any) -> None:
        self.data.update(values)
        replaced(self.folder / _NAME, json.dumps(self.data))

    def started(self, config: object, **values: Any) -> None:
        """Note the settings of the engine that are plain values, and begin the phase ``ready``."""
        plain = (int, float, str, bool, list, type(None))
        settings = {k: v for k, v in vars(config).items() if isinstance(v, plain)}
        self.write(settings=settings, **values)
        self.enter("ready")

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.data["seconds"][phase] = round(time.monotonic() - self._start, 3)
        self.begin(phase)
        self.write(phase=phase)

    def case(
        self,
        name: str,
        tokens: Sequence[int],
        begun: float,
        statuses: Sequence[str],
        words: str = "",
    ) -> bool:
        """Note how a rehearsal case ended; return whether the engine can take another case.

        ``tokens`` has each prompt's number of tokens, ``words`` is an error's text; ``begun`` is a
        time of the monotonic clock.
        """
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        seconds = round(time.monotonic() - begun, 3)
        case = {"name": name, "tokens": list(tokens), "seconds": seconds, "statuses": counts}
        self.data["cases"].append({**case, "words": words})
        self.write()
        return not counts.keys() & {NOT_FINISHED, *DEAD}

    def error(self, error: BaseException) -> None:
        """Note the error that ended the engine, with its phase and its frames, outermost first."""
        frames = traceback.extract_tb(error.__traceback__)
        self.write(
            error={
                "type": type(error).__name__,
                "message": str(error),
                "phase": self.phase,
                "frames": [f"{f.filename}:{f.lineno} {f.name}" for f in frames],
            }
        )


def called_after(act: Callable[[], object], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, before each call of which ``act`` is called."""

    def step(*args: Any, **kwargs: Any) -> Any:
        act()
        return call(*args, **kwargs)

    return step


def replaced(path: Path, text: str) -> None:
    """Replace a file so that readers never see half of it.

    After a crash the file may be lost; `write_atomic` prevents this.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_notes(folder: Path) -> Document:
    """Return the content of a child's ``report.json`` in its folder; empty if there is none."""
    try:
        data: dict[str, Any] = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data
