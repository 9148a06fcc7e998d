"""One line of the results, and a log of such lines that a run which is broken off goes on from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

Fate = Literal["survived", "died", "refused", "hung", "stalled"]


class Row(NamedTuple):
    """What one setting did on one pair.

    ``fate``: ``refused`` is a start that did not come about, ``died`` a server that had started,
    ``stalled`` one that the pretend machine could not take further: nothing is known of it.
    ``tokens`` is the KV cache, None where none was made; ``host`` bytes of the process tree at its
    peak; ``ready`` seconds until the engine was up, on the pretend machine.
    """

    pair: str
    who: str
    settings: str
    tokens: int | None
    fate: Fate
    of: str
    host: int
    pinned: int | None
    ready: float | None
    note: str = ""


class RowLog:
    """Rows by pair and setting: those of the file, if there is one, and those that are run."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = kept(path) if path is not None else {}

    def row(self, pair: str, who: str, run: Callable[[], Row]) -> Row:
        """What the log has, else what is run now, told and kept."""
        if (pair, who) not in self.rows:
            found = self.rows[pair, who] = run()
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found._asdict()) + "\n")
            told = f"  {who}: {found.tokens} tokens, {found.fate} {found.of} {found.note}"
            print(told, file=sys.stderr, flush=True)
        return self.rows[pair, who]


def kept(log: Path) -> dict[tuple[str, str], Row]:
    """The rows of a log, by pair and setting."""
    if not log.exists():
        return {}
    rows = [Row(**json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]
    return {(row.pair, row.who): row for row in rows}
