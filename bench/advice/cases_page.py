"""The figures of docs/cases.md, renewed: what its recipes give, and the rows of advice in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.advice.compute import Case, run
from bench.advice.report import short_rows

__all__ = ["FIGURES", "recipes", "renewed"]

#: What a plan's verdict says of capacity and of what is left.
FIGURES = (
    re.compile(r"[\d,]+ KV tokens"),
    re.compile(r"[\d,]+ tokens at a time"),
    re.compile(r"[\d.,]+ [KMG]iB stay free"),
)
_RECIPE = re.compile(r"\| [^|]+ \| [^|]*`(plan [^`|]*--on [^`|]*)`[^|]*\| ([^|]+) \|")


def recipes(text: str) -> list[tuple[str, str]]:
    """Each recipe's command without ``turbofit``, and what its row says of the plan."""
    return [(found[1], found[2]) for line in text.splitlines() if (found := _RECIPE.match(line))]


def renewed(text: str, cases: Sequence[Case]) -> str:
    """The text with every figure as it is now; nothing else is changed."""
    now = {_key(row): row for row in short_rows(cases)}
    lines = [_recipe(now.get(_key(line), line)) for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _key(row: str) -> str:
    """Case and advice."""
    return "|".join(row.split("|", 3)[:3])


def _recipe(line: str) -> str:
    found = _RECIPE.match(line)
    if not found:
        return line
    plan = run(found[1]).plan
    answer = found[2]
    for figure in FIGURES:
        said = figure.search(plan.verdict) if plan is not None else None
        if said:
            answer = figure.sub(said[0], answer)
    return line[: found.start(2)] + answer + line[found.end(2) :]
