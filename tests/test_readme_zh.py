"""The Chinese README gives the same figures as the English one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHINESE = (ROOT / "README.zh-CN.md").read_text()
ENGLISH = (ROOT / "README.md").read_text()
CASES = (ROOT / "docs" / "cases.md").read_text()
ACCURACY = (ROOT / "docs" / "accuracy.md").read_text()


def commands(text: str) -> dict[str, str]:
    """Each recipe's command, and the rest of its row."""
    rows = (line for line in text.splitlines() if line.startswith("|"))
    found = (re.match(r"\|.*?\| `(plan [^`]+)` \|(.*)", row) for row in rows)
    return {match[1]: match[2] for match in found if match}


def test_every_figure_is_the_english_ones() -> None:
    english = {
        command: row
        for row in CASES.splitlines()
        if row.startswith("|")
        for command in re.findall(r"`(plan [^`]+)`", row)
    }
    chinese = commands(CHINESE)
    assert len(chinese) >= 7
    for command, row in chinese.items():
        for figure in re.findall(r"\d[\d,]+ (?:KV tokens|MiB)", row):
            assert figure in english[command], (command, figure)


def test_the_same_two_commands_and_example() -> None:
    for line in ENGLISH.split("## Two commands")[1].split("## ")[0].splitlines():
        if line.startswith("    "):
            assert line in CHINESE
    assert "](docs/terminal.svg)" in ENGLISH
    assert "](docs/terminal.svg)" in CHINESE


def test_several_machines_have_the_same_commands() -> None:
    own = CHINESE.split("## 多台机器(Ray)")[1].split("\n## ")[0]
    section = ENGLISH.split("## On several machines")[1].split("\n## ")[0]
    both = [re.findall(r"^    (\S.*?)(?:\s+#.*)?$", text, re.MULTILINE) for text in (own, section)]
    assert both[0] == both[1]
    assert len(both[0]) == 6


def test_accuracy_is_the_english_ones() -> None:
    for figure in re.findall(r"(0\.\d\d) ?%", CHINESE):
        assert f"{figure} %" in ACCURACY


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", CHINESE):
        assert (ROOT / target).exists(), target


def test_the_glossary_has_its_words() -> None:
    glossary = (ROOT / "docs" / "architecture.md").read_text().split("| word | Chinese |")[1]
    rows = re.findall(r"^\| ([^|-]+) \| ([^|]+) \|$", glossary.split("\n## ")[0], re.MULTILINE)
    assert len(rows) >= 15
    for word, chinese in rows:
        assert chinese.split("(")[0] in CHINESE, word
