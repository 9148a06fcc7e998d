"""``python scripts/symptoms.py``: the tables of both troubleshooting pages, by message.

Each message of `symptoms.yaml` is given to `diagnose`, and its row is the answer. The gateway's
refusals are rows of `presets/refusals.yaml`. So the English page says what the program says; the
Chinese one has the Chinese words of `symptoms.yaml`.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from turbofit.core.presets import load_yaml
from turbofit.diagnose.explain import diagnose
from turbofit.diagnose.rules.causes import causes
from turbofit.gateway.http.refusals import refusals
from turbofit.observe.engine_end import IN_DIAGNOSIS

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT: Final = Path(__file__).parents[1]
_DOCS: Final = _ROOT / "docs"
_CHINESE: Final = _DOCS / "zh"
PAGES: Final = (_DOCS / "troubleshooting.md", _CHINESE / "troubleshooting.md")
_LOGS, _REFUSALS = "logs", "refusals"
#: In `symptoms.yaml` no group of messages: words of the Chinese page.
_WORDS: Final = "Chinese"
_SEES: Final = "| you see | what it means, and what helps |\n|---|---|"
_SEES_ZH: Final = "| 看到的信息 | 含义与处理 |\n|---|---|"
_GETS: Final = "| status, `code` | message | more |\n|---|---|---|"
_GETS_ZH: Final = "| 状态码、`code` | 信息 | 含义 | 详见 |\n|---|---|---|---|"

#: Of a message that does not tell its cause.
_UNTOLD: Final = "unknown: this message does not tell its cause"
_UNTOLD_ZH: Final = "unknown：这条信息没有说明原因"


class Symptom(NamedTuple):
    """A message, and what `diagnose` answers to it: ``had`` by others, where no cause is proven."""

    group: str
    message: str
    page: str
    kind: str
    what: str
    had: tuple[str, ...]
    changes: tuple[str, ...]
    chinese: list[str]


class Refused(NamedTuple):
    """An answer of the gateway that is no answer of an engine."""

    code: str
    status: int
    message: str
    page: str


@cache
def symptoms() -> tuple[Symptom, ...]:
    """Every message of `symptoms.yaml`."""
    found = []
    for group, rows in _table().items():
        for row in rows if group != _WORDS else ():
            diagnosis = diagnose([row.get("log", row["message"]).encode()])
            others = diagnosis.others
            answer = (
                (others.message, _UNTOLD, others.had, others.tried)
                if others
                else (diagnosis.kind, diagnosis.what, (), diagnosis.changes)
            )
            chinese = row.get("zh", "").splitlines()
            found.append(Symptom(group, row["message"], row["page"], *answer, chinese))
    return tuple(found)


@cache
def _table() -> dict[str, Any]:
    return load_yaml(_ROOT / "scripts" / "symptoms.yaml")


def rule_kinds() -> set[str]:
    """Each kind of answer that a rule of `diagnose` can give."""
    found: set[object] = {cause.kind for cause in causes()} | {*IN_DIAGNOSIS.values()}
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


def renewed(page: Path) -> str:
    """A page with its tables as they are now; nothing else is changed."""
    text, chinese = page.read_text(encoding="utf-8"), page.parent == _CHINESE
    for name, rows in ((_LOGS, _log_tables(chinese)), (_REFUSALS, _refusals(chinese))):
        begin, end = f"<!-- {name}: python scripts/symptoms.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        table = "\n".join(rows)
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def _log_tables(chinese: bool) -> Iterator[str]:
    group, titles = "", _table()[_WORDS]["groups"]
    for one in symptoms():
        if one.group != group:
            title, head = (titles[one.group], _SEES_ZH) if chinese else (one.group, _SEES)
            yield f"{'' if not group else chr(10)}### {title}\n\n{head}"
            group = one.group
        what, *more = _chinese(one) if chinese and one.chinese else _english(one)
        kind = f"（`{one.kind}`）" if chinese else f" (`{one.kind}`)"
        link = f"详见：{_link_zh(one.page)}" if chinese else f"More: {_link(one.page)}"
        yield _row(_code(one.message), "<br>".join([what + kind, *more, link]))


def _english(one: Symptom) -> list[str]:
    had = [f"others who met it had: {'; or '.join(one.had)}"] if one.had else []
    return [one.what, *had, *(f"• {change}" for change in one.changes)]


def _chinese(one: Symptom) -> list[str]:
    return [_UNTOLD_ZH, *one.chinese] if one.had else one.chinese


def _refusals(chinese: bool) -> Iterator[str]:
    meanings = _table()[_WORDS]["refusals"]
    yield _GETS_ZH if chinese else _GETS
    for one in refused():
        status = f"{one.status} `{one.code}`"
        if chinese:
            meaning = meanings[f"{one.status} {one.code}"]
            yield _row(status, one.message, meaning, _link_zh(one.page))
        else:
            yield _row(status, one.message, _link(one.page))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(message: str) -> str:
    return f"`` {message} ``" if "`" in message else f"`{message}`"


def _link(page: str) -> str:
    return f"[{page.partition('.')[0]}]({page})"


def _link_zh(page: str) -> str:
    """To the Chinese twin of a page, whose headings stand in the same order, else to the page."""
    name, _, anchor = page.partition("#")
    if not (_CHINESE / name).exists():
        return f"[{name.partition('.')[0]}](../{page})"
    if anchor:
        place = anchors(_DOCS / name).index(anchor)
        page = f"{name}#{anchors(_CHINESE / name)[place]}"
    return _link(page)


@cache
def anchors(page: Path) -> list[str]:
    """What its headings are called in an address, on GitHub and on the site."""
    heads = re.findall(r"^#+ (.+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page), encoding="utf-8")
