"""Each Chinese page of the manual says what its English twin says: line by line the same facts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TWINS = {"README.md": "README.zh-CN.md"} | {
    f"docs/{path.name}": f"docs/zh/{path.name}"
    for path in sorted((ROOT / "docs" / "zh").glob("*.md"))
}
_KINDS = (("#", r"#+ "), ("row", r"\|"), ("item", r"(?:-|\d+\.) "), ("code", r"    \S"))
_CODE = re.compile(r"``(.+?)``|`([^`]+)`")
_LINK = re.compile(r"\]\(([^)#\s]*)[^)]*\)")
_FACT = re.compile(r"--[a-z][\w-]*|\d+(?:[.,]\d+)*")


class Block(NamedTuple):
    """A heading, a row of a table, an item of a list, a line of code or a paragraph."""

    line: int
    kind: str
    text: str

    @property
    def facts(self) -> set[str]:
        """Its code, figures, options and the pages that its links lead to."""
        if self.kind == "code":
            return {re.sub(r"\s+#.*", "", self.text)}
        code = {(one[1] or one[2]).strip() for one in _CODE.finditer(self.text)}
        text = _CODE.sub("", self.text)
        pages = {Path(page).name.replace(".zh-CN", "") for page in _LINK.findall(text)}
        return code | pages | set(_FACT.findall(_LINK.sub("]", text)))


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page; comments are none."""
    block: Block | None = None
    fenced = False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        kind = next((kind for kind, start in _KINDS if re.match(start, line)), "text")
        if line.startswith("```"):
            fenced = not fenced
        elif fenced:
            yield Block(number, "code", line)
        elif block and line and kind == "text":
            block = block._replace(text=f"{block.text} {line.strip()}")
        else:
            if block:
                yield block
            level = line.split()[0] if kind == "#" else kind
            block = Block(number, level, line) if line and not line.startswith("<!--") else None


@pytest.mark.parametrize(("english", "chinese"), TWINS.items())
def test_both_languages_have_the_same_facts(english: str, chinese: str) -> None:
    pages = [list(blocks((ROOT / name).read_text(encoding="utf-8"))) for name in (english, chinese)]
    differ = []
    for one, twin in zip_longest(*pages):
        if one is None or twin is None or one.kind != twin.kind:
            differ.append(f"here the pages part: {one} / {twin}")
            break
        if facts := one.facts ^ twin.facts:
            differ.append(f"{english}:{one.line}, {chinese}:{twin.line}: {sorted(facts)}")
    assert not differ, "\n".join(differ)


def test_the_glossary_has_its_words() -> None:
    chinese = "".join((ROOT / name).read_text(encoding="utf-8") for name in TWINS.values())
    glossary = (ROOT / "docs" / "architecture.md").read_text().split("| word | Chinese |")[1]
    rows = re.findall(r"^\| ([^|-]+) \| ([^|]+) \|$", glossary.split("\n## ")[0], re.MULTILINE)
    assert len(rows) >= 15
    for word, meaning in rows:
        assert re.split(r"[（(]", meaning)[0] in chinese, word
