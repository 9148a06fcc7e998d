"""`presets/causes.yaml`: known messages, and lines with figures."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from msgspec import field

from turbofit.core.presets import converted, load_yaml, presets_dir
from turbofit.core.struct import Struct
from turbofit.diagnose.answer import PhaseName

if TYPE_CHECKING:
    from collections.abc import Iterator

#: By its relation to a fact, below, above, equal or within: a value, or the name of another fact;
#: matches: a pattern; or `absent: true` (`false`: the log has it).
Condition = dict[str, Any]
#: A cause ends a run; a refusal is a program's own check, by its form alone, and is asked after all
#: causes; a consequence follows one; a notice harms nobody.
Rank = Literal["cause", "refusal", "consequence", "notice"]

#: A program prints its settings in one line: names with values, by commas. It is no message.
_SETTINGS: Final = re.compile(r"(?:\w+=[^,]*, ?){3}|(?:['\"]\w+['\"]: [^,]*, ?){3}")


class Cause(Struct):
    """One row, as `presets/causes.yaml` says. Without `what` it proves no cause."""

    kind: str
    words: tuple[str, ...]
    pattern: str
    phase: PhaseName = "unknown"
    what: str = ""
    why: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()
    change: tuple[str, ...] = ()
    rank: Rank = "cause"
    planned: bool = False
    settings: bool = False
    common: bool = False
    when: dict[str, Condition] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    source: str = ""


class _Fact(Struct):
    """A line whose named groups are facts."""

    words: tuple[str, ...]
    pattern: str


class _Table(Struct):
    facts: tuple[_Fact, ...]
    #: What would tell more of an error that no row knows, and words of its line.
    send: dict[str, tuple[str, ...]]
    out_of_memory: dict[str, dict[str, tuple[str, ...]]]
    causes: tuple[Cause, ...]


@cache
def _table() -> _Table:
    path = presets_dir() / "causes.yaml"
    return converted(load_yaml(path), _Table, path)


def causes() -> tuple[Cause, ...]:
    return _table().causes


def fact_lines() -> tuple[_Fact, ...]:
    return _table().facts


def less_memory(program: str | None, phase: PhaseName | Literal["oversized"]) -> tuple[str, ...]:
    """What takes less memory in a phase of a program, in its own options."""
    table = _table().out_of_memory
    rows = table.get(program or "other", table["other"])
    return rows.get(phase, rows["any"])


def what_to_send(error: str) -> tuple[str, ...]:
    """What would tell more of an error that no row knows, by its line and the log's programs."""
    send = _table().send.items()
    return tuple(text for text, words in send if any(word in error for word in words))


@cache
def _words() -> re.Pattern[str]:
    """Matches each line that a row could match: most lines are passed over by it."""
    return re.compile(_any_of({word for row in causes() for word in row.words}))


def _any_of(words: set[str]) -> str:
    """A pattern for any of these words; a beginning that some share is asked for once."""
    if "" in words:
        return ""
    starts = sorted({word[0] for word in words})
    rest = {start: _any_of({word[1:] for word in words if word[0] == start}) for start in starts}
    ways = "|".join(re.escape(start) + rest[start] for start in starts)
    return f"(?:{ways})" if len(starts) > 1 else ways


#: A repeat of figures, words or other text without spaces, which has no bound as it is written.
_NAME: Final = re.compile(r"(\\[Swd]|\[(?!\^)[^\]]*\])([+*])")
#: Letters of the longest list item or figure that a message names, and of the longest path.
_LONGEST_NAME: Final = 240
_LONGEST_PATH: Final = 1024
#: A group that names a file, folder or checkpoint, and no class.
_PATH: Final = re.compile(
    r"\(\?P<(?:path|folder|where|files?|library|model|weights|image|wanted)>(?!\\w)(?:[^()\\]|\\.)*\)"
)


@cache
def pattern_of(text: str) -> re.Pattern[str]:
    """A row's pattern with bounded names: else a line of one word takes the square of its time."""
    wide = _PATH.sub(lambda match: _bounded(match[0], _LONGEST_PATH), text)
    return re.compile(_bounded(wide, _LONGEST_NAME))


def _bounded(text: str, most: int) -> str:
    return _NAME.sub(lambda match: f"{match[1]}{{{int(match[2] == '+')},{most}}}", text)


def _match(row: Cause | _Fact, text: str) -> re.Match[str] | None:
    likely = any(word in text for word in row.words)
    return pattern_of(row.pattern).search(text) if likely else None


def matches(text: str) -> Iterator[tuple[Cause, re.Match[str]]]:
    """Rows that have this line, in their order, whatever else the log says."""
    if not _words().search(text):
        return
    settings = _SETTINGS.search(text) is not None
    for cause in causes():
        if (cause.settings or not settings) and (match := _match(cause, text)):
            yield cause, match


def caught(text: str) -> dict[str, str]:
    fact_matches = [match for row in fact_lines() if (match := _match(row, text))]
    return {
        name: value for match in fact_matches for name, value in match.groupdict().items() if value
    }


def told_figures(text: str) -> int:
    """How much the first row that has a line catches of it; -1 where none has it."""
    first = next(matches(text), None)
    return -1 if first is None else sum(group is not None for group in first[1].groups())
