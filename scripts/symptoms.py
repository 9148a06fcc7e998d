"""``python scripts/symptoms.py``: the tables of docs/troubleshooting.md, by message.

Each message of `symptoms.yaml` is given to `diagnose`, and its row is the answer. The gateway's
refusals are rows of `presets/refusals.yaml`. So the page says what the program says.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import yaml

from turbofit.diagnose.explain import diagnose
from turbofit.diagnose.rules.causes import causes
from turbofit.gateway.http.refusals import refusals

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PAGE", "Refused", "Symptom", "refused", "renewed", "rule_kinds", "symptoms"]

_ROOT: Final = Path(__file__).parents[1]
PAGE: Final = _ROOT / "docs" / "troubleshooting.md"
_LOGS, _REFUSALS = "logs", "refusals"
_SEES: Final = "| you see | what it means, and what helps |\n|---|---|"
_GETS: Final = "| status, `code` | message | more |\n|---|---|---|"


class Symptom(NamedTuple):
    """A message, and what `diagnose` answers to it."""

    group: str
    message: str
    page: str
    kind: str
    what: str
    possible: tuple[str, ...]
    changes: tuple[str, ...]


class Refused(NamedTuple):
    """An answer of the gateway that is no answer of an engine."""

    code: str
    status: int
    message: str
    page: str


def symptoms() -> Iterator[Symptom]:
    """Every message of `symptoms.yaml`."""
    groups = yaml.safe_load((_ROOT / "scripts" / "symptoms.yaml").read_text(encoding="utf-8"))
    for group, rows in groups.items():
        for row in rows:
            said = diagnose([row.get("log", row["message"]).encode()])
            told = (said.kind, said.what, said.possible, said.changes)
            yield Symptom(group, row["message"], row["page"], *told)


def rule_kinds() -> set[str]:
    """Each kind of answer that a rule of `diagnose` can give."""
    found: set[object] = {cause.kind for cause in causes()}
    for path in (_ROOT / "turbofit" / "diagnose" / "rules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "kind":
                found |= {node.value.value} if isinstance(node.value, ast.Constant) else set()
    return {str(kind) for kind in found}


def refused() -> list[Refused]:
    """Each status and code of `presets/refusals.yaml` with its sentences, in their order."""
    found: dict[tuple[int, str], Refused] = {}
    for key, row in refusals().items():
        code = key.partition(":")[0]
        says = re.sub(r"{[^}]*}", "…", row.says)
        one = found.get((row.status, code))
        message = says if one is None else f"{one.message}<br>{says}"
        found[row.status, code] = Refused(code, row.status, message, row.more)
    return sorted(found.values(), key=lambda one: (one.status, one.code))


def renewed(text: str) -> str:
    """The page with its tables as they are now; nothing else is changed."""
    for name, table in ((_LOGS, "\n".join(_log_tables())), (_REFUSALS, "\n".join(_refusals()))):
        begin, end = f"<!-- {name}: python scripts/symptoms.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def _log_tables() -> Iterator[str]:
    group = ""
    for one in symptoms():
        if one.group != group:
            yield f"{'' if not group else chr(10)}### {one.group}\n\n{_SEES}"
            group = one.group
        answer = [f"{one.what} (`{one.kind}`)"]
        if one.possible:
            answer.append(f"seen with: {'; or '.join(one.possible)}")
        answer += [f"• {change}" for change in one.changes]
        yield _row(_code(one.message), "<br>".join([*answer, f"More: {_link(one.page)}"]))


def _refusals() -> Iterator[str]:
    yield _GETS
    for one in refused():
        yield _row(f"{one.status} `{one.code}`", one.message, _link(one.page))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(message: str) -> str:
    return f"`` {message} ``" if "`" in message else f"`{message}`"


def _link(page: str) -> str:
    return f"[{page.partition('.')[0]}]({page})"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
