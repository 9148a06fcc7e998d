"""What people tell beside a log: a report's title, and the sentences around what was pasted."""

from __future__ import annotations

import re
from typing import Final

from turbofit.diagnose.event import LogEvent
from turbofit.diagnose.rows import by_program
from turbofit.diagnose.rules.causes import hits_of
from turbofit.observe.log_events import KnownMessage

#: An exception by its name, within a sentence.
NAMED: Final = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+")
_FENCE: Final = "```"
#: Sentences that are kept: more are no report.
_MOST: Final = 200


class ToldLines:
    """The title, and sentences that a row knows or that name an exception, in their order."""

    def __init__(self) -> None:
        self.marks: list[LogEvent] = []
        self._titled = self._fenced = False
        self._first = True

    def notice(self, line: int, text: str) -> None:
        """Take in any row: within a fence, and below no title, it is the log's.

        The first line may be all that somebody wrote: without a title it is asked of people's own
        words alone.
        """
        title = text.startswith("# ")
        first, self._first = self._first, False
        self._titled = self._titled or title
        if text.startswith(_FENCE):
            self._fenced = not self._fenced
        elif not self._fenced and (title or ((self._titled or first) and not by_program(text))):
            self._take(LogEvent(line, text, KnownMessage(), (), "", hits_of(text, told=True)))

    def _take(self, mark: LogEvent) -> None:
        of_people = mark.row is not None and mark.row.rank == "told"
        known = of_people or (self._titled and (mark.hits or NAMED.search(mark.text)))
        if known and len(self.marks) < _MOST:
            self.marks.append(mark)

    def has(self, line: int) -> bool:
        return any(mark.line == line for mark in self.marks)
