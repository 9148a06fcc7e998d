"""Reads a log as numbered lines without colours, carriage returns and prefixes."""

from __future__ import annotations

import re
from codecs import iterdecode
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Row(NamedTuple):
    """A line's number from 1, and its text."""

    line: int
    text: str


_ANSI: Final = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][0-9A-B])")
#: The words of journald between the time and the line: the host, the unit, the pid.
_UNIT = r"[\w.-]+ [\w@.\\/-]+\[\d+\]:\s?"
#: Prefixes before each line: of pytest, a quotation, an exception group, Ray, torchrun, srun,
#: docker compose, kubectl, containerd, `journalctl`, vLLM, LLaVA's worker, ms-swift, LMDeploy's
#: checks, and the line numbers of `grep -n`.
_PREFIX: Final = re.compile(
    r"(?:E {7}|> (?![>$ ])| {2,8}\| (?!.*\|$)|\(\w[\w.]*(?: rank=\d+)? pid=\d+(?:, ip=[\d.]+)?\)\s?"
    r"|(?:ERROR|CRITICAL) \d\d-\d\d [\d:]{8} \[?\w+\.py:\d+\] ?"
    r"|\d{4}-\d\d-\d\d [\d:]{8} \| [A-Z]+ \| \w+ \| |\[(?:INFO|ERROR|WARNING):\w+\] "
    r"|\d{4}-\d\d-\d\d [\d:,]+ - lmdeploy - ERROR - (?=\w+(?:Error|Exception): )"
    r"|\d{1,6}:(?=\[TM\]|\[\d{4}-|INFO: )"
    r"|\[?rank\d+\]?:\s?(?:\[rank\d+\]:\s?)?"
    r"|\[\d+\]:\s?|\d{1,4}:\s"
    r"|\[pod/[\w.-]+/[\w.-]+\]\s"
    r"|[\w.-]+-\d+\s+\|\s?|[\w.-]+ +\|\s"
    rf"|[A-Z][a-z][a-z] [ \d]\d [\d:.]{{8,15}} {_UNIT}"
    rf"|\d{{4}}-\d\d-\d\dT[\d:.]+(?:Z|[+-]\d\d:?\d\d)\s(?:{_UNIT}|std(?:out|err) [FP]\s)?)+"
)
#: The prefix of a logger before an error's own line, in any form.
_LOGGED: Final = re.compile(
    r"[^'\"=]{0,120}?\b(?:ERROR|CRITICAL|FATAL|error|fatal)\b[^'\"=A-Za-z]{0,12}"
    r"(?:[\w.]+:[\w<>]+:\d+ - )?(?=(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): )"
)
_TRACEBACK: Final = "Traceback (most recent call last)"
_LONGEST_PREFIX: Final = 120
#: The beginnings of further rows in a line: a progress bar rewrites it with carriage returns, and
#: engines print in the middle of it. An error's text that quotes a TurboMind line stays whole.
_NEXT_ROW: Final = re.compile(
    r"\r|(?<!Error:)(?<!Error: )(?<!Error: b')(?<!what\(\):)(?<!what\(\): )(?<!what\(\):  )"
    r"(?=\[TM\]\[)"
)
#: The text after these words of LMDeploy's or vLLM's request log is a client's or the model's.
_REQUEST: Final = re.compile(
    r".{0,240}?(?: - logger\.py:\d+ - session=[^,]*, |\bReceived request \S+: )"
)
_LONGEST: Final = 8192


def rows(chunks: Iterable[bytes]) -> Iterator[Row]:
    """Yield the lines of a log that comes in pieces, cut to a length that loses nothing useful.

    Rows of one line have the same number. UTF-16 (PowerShell's redirection) is read.
    """
    logged: re.Pattern[str] | None = None
    for number, line in enumerate(_lines(chunks), 1):
        for part in _parts(line):
            text = _bare(part)
            at = text.find(_TRACEBACK)
            if 0 < at <= _LONGEST_PREFIX:  # its logger writes the same before the frames
                logged = re.compile(re.sub(r"\d+", r"\\d+", re.escape(text[:at])))
            match = logged.match(text) if logged else None
            if match is None and ("Error: " in text or "Exception: " in text):
                match = _LOGGED.match(text)
            if text := text[match.end() :] if match else text:
                yield Row(number, text)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    pieces, rest = iter(chunks), ""
    first = next(pieces, b"")
    code = "utf-16" if first[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    for text in iterdecode(chain([first], pieces), code, "replace"):
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield from rest.split("\n")


def _parts(line: str) -> list[str]:
    if "\x1b" in line:
        line = _ANSI.sub("", line)
    line = line.strip("\r\ufeff")
    several = "\r" in line or line.find("[TM][", 1) > 0
    return _NEXT_ROW.split(line) if several else [line]


def _bare(text: str) -> str:
    """A row without known prefixes, and without the text of a client."""
    text = text[:_LONGEST].rstrip()
    match = _PREFIX.match(text)
    if match and match.end() < len(text):
        text = text[match.end() :]
    if ("session=" in text or "Received" in text) and (request := _REQUEST.match(text)):
        return request[0].rstrip()
    return "" if text.isspace() else text
