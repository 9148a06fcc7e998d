"""Reads `presets/causes.yaml`, the table of known messages, and finds the rows of a log's line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final, Literal, NamedTuple

from turbofit.core.engine_end import Phase
from turbofit.core.presets import read_preset
from turbofit.core.struct import Struct
from turbofit.logs.log_events import PythonFrame
from turbofit.logs.log_reader import Form, zeros

#: A cause ends a run. A refusal is an exception without a row. A consequence follows a cause or a
#: refusal. A notice harms nobody. A remark is of a run that may be healthy.
Rank = Literal["cause", "refusal", "consequence", "notice", "remark"]
#: A sentence with figures in braces; or such a sentence, and another one to use if one of its
#: figures is unknown.
Sentence = str | tuple[str, str]

#: A line that prints a program's settings, as names with values and commas.
_SETTINGS: Final = re.compile(r"(?:\w+=[^,]*, ?){3}|(?:['\"]\w+['\"]: [^,]*, ?){3}")
#: Words of a line that reports an end: an exception's name, a logger's level, a signal, an exit.
END: Final = re.compile(
    r"[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b|\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL)\b"
    r"|\b(?:[Ff]ailed|Aborted|Killed|OOMKilled|Exited|SIG[A-Z]+|[Tt]imeout|timed out|Xid|dumped)\b"
    r"|status=|finish_reason|[Ee]xit ?[Cc]ode|\[TM\]|NCCL WARN"
)
#: The part of a line that a row without a pattern quotes.
_WHOLE: Final = r"\S.{0,159}"
#: Frames of torch. A row's ``frame`` is compared with the frame that called torch: it tells more.
_OF_TORCH: Final = re.compile(r"[/\\]torch[/\\]").search
#: An unbounded repetition in a pattern, such as ``\w+`` or ``\S*``.
_NAME: Final = re.compile(r"(\\[Swd]|\[(?!\^)[^\]]*\])([+*])")
#: Characters of the longest name, path or figure that a message has.
_LONGEST_NAME: Final = 1024


class Row(Struct):
    """A row of `presets/causes.yaml`; the head of the file explains the fields.

    A row without ``what`` proves no cause.
    """

    kind: str
    says: tuple[str, ...]
    pattern: str = ""
    when: str = ""
    frame: str = ""
    what: Sentence = ""
    why: tuple[Sentence, ...] = ()
    possible: tuple[Sentence, ...] = ()
    change: tuple[Sentence, ...] = ()
    unknown: tuple[Sentence, ...] = ()
    rank: Rank = "cause"
    phase: Phase | None = None
    source: str = ""


class Kind(Struct):
    """The facts of all rows of a kind: the phase of a proven cause; whether answers need a plan."""

    phase: Phase = "unknown"
    plan: bool = False


class _Table(Struct):
    """The content of `presets/causes.yaml`; the head of the file explains it."""

    kinds: dict[str, Kind]
    #: Names in Transformers by the release that added them, and by the release that removed them.
    brought: dict[str, tuple[str, ...]]
    dropped: dict[str, tuple[str, ...]]
    #: By the member of LMDeploy's ``ResponseType``: what it means, and the step.
    responses: dict[str, tuple[str, str]]
    #: Texts on what a user should send, each with the words that select the text (`what_to_send`).
    send: dict[str, tuple[str, ...]]
    texts: dict[str, str]
    out_of_memory: dict[str, dict[str, tuple[str, ...]]]
    rows: tuple[Row, ...]


class Hit(NamedTuple):
    """A row that a line matches.

    ``fields``: the named groups of the row's pattern. ``said``: the part of the line to quote.
    """

    row: Row
    fields: Mapping[str, str]
    said: str


@cache
def table() -> _Table:
    return read_preset("", "causes", _Table)


def release_of(name: str, *, dropped: bool) -> str | None:
    """Return the Transformers release that added a name, or removed it (``dropped``), or None."""
    names = table().dropped if dropped else table().brought
    return next((release for release, listed in names.items() if name in listed), None)


def less_memory(program: str, phase: str) -> tuple[str, ...]:
    """Return changes that save memory in a phase of a program, by the program's own options."""
    rows = table().out_of_memory[program]
    return rows.get(phase, rows["any"])


def text_of(name: str) -> str:
    """Return a step or another sentence of an answer that belongs to no single row."""
    return table().texts[name]


def what_to_send(about: str) -> tuple[str, ...]:
    """Return the texts on what a user should send, so that the cause can be found.

    A text of ``send`` in `presets/causes.yaml` is returned if ``about`` has one of its words.
    ``about`` is the quoted line with marks behind it, which `explain` makes of the whole log: for
    instance ``(still)`` if the engine stands still, ``(no start)`` if the log lacks the start.
    """
    return tuple(
        text for text, words in table().send.items() if any(word in about for word in words)
    )


@cache
def _words() -> list[tuple[str, Row]]:
    return [(zeros(word), row) for row in table().rows for word in row.says]


def _rows_in(form: str) -> tuple[Row, ...]:
    """Return the rows with a word (of ``says``) in a line, in the table's order.

    ``form``: the line with 0 for each digit.
    """
    return tuple(dict.fromkeys([row for word, row in _words() if word in form]))


@cache
def pattern_of(text: str) -> re.Pattern[str]:
    """Compile a row's pattern with bounded repetitions, so that no line takes quadratic time."""
    bounded = _NAME.sub(lambda m: f"{m[1]}{{{int(m[2] == '+')},{_LONGEST_NAME}}}", text)
    return re.compile(bounded)


def _place_of(stack: Sequence[PythonFrame]) -> str:
    """Return the innermost frame outside torch as PATH:FUNCTION:CODE; empty without one."""
    own = (frame for frame in reversed(stack) if not _OF_TORCH(frame.path))
    return next((f"{frame.path}:{frame.function}:{frame.code}" for frame in own), "")


def hits_of(
    text: str, form: Form | None = None, stack: Sequence[PythonFrame] = ()
) -> tuple[Hit, ...]:
    """Return a hit for each row of `presets/causes.yaml` that matches a line, in the table's order.

    A line that prints a program's settings has no hits, unless it also reports an end. ``stack``
    has the frames of the line's traceback, the innermost last.
    """
    rows, hits = form.ask(_rows_in) if form else _rows_in(zeros(text)), []
    if not rows or (_SETTINGS.search(text) and not END.search(text)):
        return ()
    for row in rows:
        if row.frame and not pattern_of(row.frame).search(_place_of(stack)):
            continue
        match = pattern_of(row.pattern or _WHOLE).search(text)
        # A form fits any digits, so a row's word is also searched in the text.
        if match is not None and any(word in text for word in row.says):
            caught = {name: value for name, value in match.groupdict().items() if value}
            hits.append(Hit(row, caught, caught.get("said", match[0].strip())))
    return tuple(hits)
