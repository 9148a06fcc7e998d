"""RESULTS.md: what each piece of advice changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.advice.compute import Case, Line, Said, words
from turbofit.core.units import MIB

__all__ = ["report", "short_rows"]

_HEAD = """\
# The advice that people were given, judged

Made by `python -m bench.advice --write`: every cell is what the command beside it says, for LMDeploy
0.18 where no other version is named. Nothing here was run on a GPU: these are forecasts of the account
([how far off it is](../accuracy/RESULTS.md)). "Lives" is: no request within the model's own image limit,
and none that the engine lets meet in one forward pass, finds too little memory. Tokens are what the KV
cache holds, over all engines.
"""


def report(cases: Sequence[Case]) -> str:
    """The whole page."""
    parts = [_HEAD, "## In short\n\n" + "\n".join(_short(cases)) + "\n"]
    parts += ["\n".join(_section(case)) + "\n" for case in cases]
    return "\n".join(parts)


def short_rows(cases: Sequence[Case]) -> list[str]:
    """The lines of the short table, without its head."""
    rows = []
    for case in cases:
        rows += [
            f"| {case.title} | {line.advice} | {_now(line)} | {judged(case, line)} |"
            for line in case.lines
            if line.short
        ]
    return rows


def judged(case: Case, line: Line) -> str:
    """What it changed against what was there before, and against our plan."""
    verdict = _verdict(case.before.said, line)
    said = [verdict, _older(case, line), line.note]
    return "; ".join(one for one in said if one)


def _verdict(before: Said, line: Line) -> str:
    after = line.said
    if after.plan is None:
        return "cannot be"
    if line.ours:
        return "" if after.serves else "says so before anything starts"
    if line.unused:
        held = sum(t.bytes for g in after.plan.gpus for t in g.ledger if t.term == line.unused)
        return f"no help: torch has at most {held // MIB} MiB that it does not use"
    if after.serves and not before.serves:
        return "helps" if after.plan.fits else "helps, below the margin"
    if after.serves:
        return _change(before.tokens, after.tokens)
    if before.serves:
        return "harms"
    if after.spare == before.spare:
        return "no help"
    return "not enough" if after.spare > before.spare else "worse"


def _change(before: int, after: int) -> str:
    if before == after:
        return "changes nothing"
    return f"{100 * (after - before) / before:+.0f} % tokens"


def _older(case: Case, line: Line) -> str:
    if line.older is None:
        return ""
    return f"on {case.version}: {words(line.older)}"


def _now(line: Line) -> str:
    return words(line.said)


def _short(cases: Sequence[Case]) -> Iterator[str]:
    yield "| case | advice | what it does | judged |"
    yield "|---|---|---|---|"
    yield from short_rows(cases)


def _section(case: Case) -> Iterator[str]:
    yield f"## {case.title}"
    yield ""
    yield case.about
    yield ""
    yield "| advice | what it does | judged | computed by `turbofit` … |"
    yield "|---|---|---|---|"
    older = f"on {case.version}: {words(case.before.older)}" if case.before.older else ""
    yield f"| **before** | {_now(case.before)} | {older} | `{case.before.command}` |"
    for line in case.lines:
        name = f"**{line.advice}**" if line.ours else line.advice
        yield f"| {name} | {_now(line)} | {judged(case, line)} | `{line.command}` |"
