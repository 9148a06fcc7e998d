"""Tells a person's own words on a crash from a log: sentences are not explained."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    from turbofit.logs.answer import Diagnosis

#: What a line of a program has, and a sentence about it does not: an exception's name, a logger's
#: level, a source line, a command, torch's figures, or the words of a shell or the kernel alone.
_OF_PROGRAM: Final = re.compile(
    r"\w(?:Error|Exception|Warning|Exit|Interrupt)\b|Traceback|[Ee]rrno|\[[\w.: ]+\]|\w\.\w+:\d"
    r"|\b(?:ERROR|FATAL|CRITICAL|WARNING|INFO|NVRM)\b|\bline \d|\b(?:python3?|lmdeploy) [\w-]"
    r"|\w: (?:error|fatal|warning|exec)|Tried to allocate|(?im:^\W*(?:\w+\.\w+: )?(?:error|killed"
    r"|aborted|segmentation|illegal|bus|(?:cuda |gpu )?out of memory|oom|fatal|exec|what\(\))\b)"
)
#: Kinds of answers that words alone can have; every other kind rests on a program's own line.
_IN_WORDS: Final = ("unknown", "out_of_memory")
#: What the evidence says of a line that a row of presets/causes.yaml matches.
_ROW: Final = "the message"


def refuse_prose(text: str, found: Diagnosis) -> None:
    """Refuse a text that a person typed in which no line is a program's.

    Raises:
        UsageError: there is no such line.
    """
    by_row = any(one.tells == _ROW for one in found.evidence)
    if by_row or found.kind not in _IN_WORDS or _OF_PROGRAM.search(text):
        return
    raise UsageError(
        "this describes a crash, and has no line of a program, which diagnose reads",
        hint="paste the last 100 lines of the log; for settings that fit: turbofit plan"
        f" {found.read.model or 'MODEL'} --on {found.read.machine or 'SPEC'}",
    )
