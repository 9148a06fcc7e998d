"""`presets/causes.yaml`: known messages, and lines with facts. A row is data."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from turbofit.core.presets import converted, load_yaml, presets_dir
from turbofit.core.struct import Struct
from turbofit.logs.death import Phase
from turbofit.logs.log_reader import zeros

if TYPE_CHECKING:
    from collections.abc import Mapping

    from turbofit.logs.log_reader import Form

#: A cause ends a run; a refusal is an exception that no row knows; a consequence follows one of
#: them; a notice harms nobody.
Rank = Literal["cause", "refusal", "consequence", "notice"]
#: A sentence with figures in braces; of two the second is told where a figure of the first misses.
Sentence = str | tuple[str, str]

#: A program prints its settings in one line: names with values, by commas. It is no message.
_SETTINGS: Final = re.compile(r"(?:\w+=[^,]*, ?){3}|(?:['\"]\w+['\"]: [^,]*, ?){3}")
#: How an end is written: an exception's name, a logger's level, a signal, an exit.
END: Final = re.compile(
    r"[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b|\b(?:[Ee]rror|ERROR|FATAL|[Ff]atal|CRITICAL)\b"
    r"|\b(?:[Ff]ailed|Aborted|Killed|OOMKilled|Exited|SIG[A-Z]+|[Tt]imeout|timed out|Xid|dumped)\b"
    r"|status=|finish_reason|[Ee]xit ?[Cc]ode|\[TM\]|NCCL WARN"
)
#: The part of a line that a row without a pattern quotes.
_WHOLE: Final = r"\S.{0,159}"


class Row(Struct):
    """One row, as the head of `presets/causes.yaml` says. Without ``what`` it proves no cause."""

    kind: str
    says: tuple[str, ...]
    pattern: str = ""
    when: str = ""
    what: Sentence = ""
    why: tuple[Sentence, ...] = ()
    possible: tuple[Sentence, ...] = ()
    change: tuple[Sentence, ...] = ()
    unknown: tuple[Sentence, ...] = ()
    rank: Rank = "cause"
    phase: Phase | None = None
    source: str = ""


class Kind(Struct):
    """What rows of a kind share: the phase of a proven cause, and whether a plan belongs to it."""

    phase: Phase = "unknown"
    plan: bool = False


class _Table(Struct):
    kinds: dict[str, Kind]
    #: Names of Transformers by the release that brought or dropped them.
    brought: dict[str, tuple[str, ...]]
    dropped: dict[str, tuple[str, ...]]
    #: What would tell more of an error that no row knows, and words of its line.
    send: dict[str, tuple[str, ...]]
    out_of_memory: dict[str, dict[str, tuple[str, ...]]]
    rows: tuple[Row, ...]


class Hit(NamedTuple):
    """A row that a line matches: what it caught, and the part that it quotes."""

    row: Row
    fields: Mapping[str, str]
    said: str


@cache
def table() -> _Table:
    path = presets_dir() / "causes.yaml"
    return converted(load_yaml(path), _Table, path)


def release_of(name: str, *, dropped: bool) -> str | None:
    """The release of Transformers that brought a name, or dropped it; None where none is known."""
    names = table().dropped if dropped else table().brought
    return next((release for release, listed in names.items() if name in listed), None)


def less_memory(program: str, phase: str) -> tuple[str, ...]:
    """What takes less memory in a phase of a program, in its own options."""
    rows = table().out_of_memory[program]
    return rows.get(phase, rows["any"])


def what_to_send(about: str) -> tuple[str, ...]:
    """What would tell more, by the words of the quoted line, and marks in brackets behind it."""
    send = table().send.items()
    return tuple(text for text, words in send if any(word in about for word in words))


@cache
def _words() -> list[tuple[str, Row]]:
    return [(zeros(word), row) for row in table().rows for word in row.says]


def _rows_in(form: str) -> tuple[Row, ...]:
    """The rows of which a line of this form has a word, in their order."""
    return tuple(dict.fromkeys([row for word, row in _words() if word in form]))


#: A repeat of figures, words or other text without spaces, which has no bound as it is written.
_NAME: Final = re.compile(r"(\\[Swd]|\[(?!\^)[^\]]*\])([+*])")
#: Characters of the longest name, path or figure that a message has.
_LONGEST_NAME: Final = 1024


@cache
def pattern_of(text: str) -> re.Pattern[str]:
    """A row's pattern with bounded names: else a line of one word takes the square of its time."""
    bounded = _NAME.sub(lambda m: f"{m[1]}{{{int(m[2] == '+')},{_LONGEST_NAME}}}", text)
    return re.compile(bounded)


def hits_of(text: str, form: Form | None = None) -> tuple[Hit, ...]:
    """Rows that have this line, in their order, whatever else the log says."""
    rows, hits = form.ask(_rows_in) if form else _rows_in(zeros(text)), []
    if not rows or (_SETTINGS.search(text) and not END.search(text)):
        return ()
    for row in rows:
        match = pattern_of(row.pattern or _WHOLE).search(text)
        if match is not None and any(word in text for word in row.says):  # not with another digit
            caught = {name: value for name, value in match.groupdict().items() if value}
            hits.append(Hit(row, caught, caught.get("said", match[0].strip())))
    return tuple(hits)
