"""The report that a rehearsal's child writes for its parent: a JSON file, replaced at each note.

The report contains no memory sizes; the engine's `RehearsedEngine` reads the sizes.
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
#: Statuses that a request has after its engine has stopped answering.
DEAD: Final = frozenset({"unavailable", "internal_error"})


class Notes:
    """Writes the report of a rehearsal's child into a file of the rehearsal's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start = time.monotonic()
        #: Begins a phase in all processes of the engine; its argument is the name of the phase.
        self.begin: Callable[[str], None] = lambda _: None
        self.phase = "import"
        #: Objects that live until the process ends, so that the last phase includes their memory.
        self.alive: list[object] = []
        self.data: dict[str, Any] = {"pid": os.getpid(), "seconds": {}, "cases": []}
        self.write()

    def write(self, **values: Any) -> None:
        self.data.update(values)
        replaced(self.folder / _NAME, json.dumps(self.data))

    def started(self, config: object, **values: Any) -> None:
        """Note all settings that are numbers, texts, lists or None; begin the phase ``ready``."""
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

        ``tokens`` has the number of tokens of each prompt, and ``statuses`` the status of each
        request. ``words`` is the text of an error. ``begun`` is when the case began, by
        `time.monotonic`.
        """
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        seconds = round(time.monotonic() - begun, 3)
        case = {"name": name, "tokens": list(tokens), "seconds": seconds, "statuses": counts}
        self.data["cases"].append({**case, "words": words})
        self.write()
        return not counts.keys() & {NOT_FINISHED, *DEAD}

    def error(self, error: BaseException) -> None:
        """Note an error that ended the engine, with its phase, and its frames, outermost first."""
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
    """Return a function that calls ``act`` first, and then ``call`` with its own arguments."""

    def step(*args: Any, **kwargs: Any) -> Any:
        act()
        return call(*args, **kwargs)

    return step


def replaced(path: Path, text: str) -> None:
    """Replace a file so that no reader ever sees half of the text.

    After a power cut the file may be lost; `write_atomic` keeps a file even then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_notes(folder: Path) -> Document:
    """Return the content of ``report.json`` in a child's folder; empty if there is no such file."""
    try:
        data: dict[str, Any] = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data
