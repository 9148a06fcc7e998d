"""RESULTS.md: what each piece of advice changes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from bench.advice.compute import Case, Line, progress, words
from turbofit.core.units import MIB

__all__ = ["judged", "report", "short_rows"]

_HEAD = """\
# The advice that people were given, judged

Made by `python -m bench.advice --write`: every cell is what the command beside it says, for
LMDeploy 0.18 where no other version is named. Nothing here was run on a GPU: these are forecasts
of the account ([how far off it is](../accuracy/RESULTS.md)). "Lives" is: no request within the
model's own image limit, and none that the engine lets meet in one forward pass, finds too little
memory; "below the margin" is with less to spare than turbofit leaves. Tokens are what the KV
cache holds, over all engines. A plan has the batch that its workload asks for (8), LMDeploy's
default is 128.
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
        rows.append(f"| {case.name} | *before: {case.before.advice}* | {_before(case)} |")
        rows += [
            f"| {case.name} | {line.advice} | {_now(line)} | {judged(case, line)} |"
            for line in case.lines
            if line.short
        ]
    return rows


def judged(case: Case, line: Line) -> str:
    """What it changed against what was there before, and against our plan."""
    verdict = _verdict(case, line)
    said = [verdict, _older(case, line), line.note]
    return "; ".join(one for one in said if one)


def _verdict(case: Case, line: Line) -> str:
    before, after = case.before.said, line.said
    if after.plan is None:
        return "cannot be"
    if line.ours:
        other = next((one for one in case.lines if one.advice == line.against), None)
        return _change(other.said.tokens, after.tokens, f' of "{line.against}"') if other else ""
    if line.unused:
        held = sum(t.bytes for g in after.plan.gpus for t in g.ledger if t.term == line.unused)
        return f"no help: torch has at most {held // MIB} MiB that it does not use"
    if after.serves and not before.serves:
        return "helps" if after.plan.fits else "helps, below the margin"
    if after.serves:
        return _change(before.tokens, after.tokens, " of before")
    if before.serves:
        return "harms"
    if words(after) == words(before):
        return "no help"
    return "not enough" if progress(after) > progress(before) else "worse"


def _change(before: int, after: int, of_what: str) -> str:
    if before == after:
        return "changes nothing"
    return f"{after / before:.2g} times the tokens{of_what}"


def _older(case: Case, line: Line) -> str:
    if line.older is None:
        return ""
    return f"on {case.version}: {words(line.older)}"


def _before(case: Case) -> str:
    """The two middle cells of what was there before."""
    return f"{_now(case.before)} | {_older(case, case.before)}"


def _now(line: Line) -> str:
    return words(line.said)


def _short(cases: Sequence[Case]) -> Iterator[str]:
    yield "| case | advice | what it does | judged |"
    yield "|---|---|---|---|"
    yield from short_rows(cases)


def _section(case: Case) -> Iterator[str]:
    yield f"## {case.title}"
    yield ""
    yield textwrap.fill(case.about, width=100)
    yield ""
    yield "| advice | what it does | judged | computed by `turbofit` … |"
    yield "|---|---|---|---|"
    name = f"*before: {case.before.advice}*"
    yield f"| {name} | {_before(case)} | `{case.before.command}` |"
    for line in case.lines:
        name = f"**{line.advice}**" if line.ours else line.advice
        yield f"| {name} | {_now(line)} | {judged(case, line)} | `{line.command}` |"
