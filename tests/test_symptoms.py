"""The troubleshooting pages say what `diagnose` and the gateway say."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from string import Formatter

import pytest

from scripts.symptoms import PAGES, renewed, rule_kinds, symptoms
from turbofit.cli.manual import EXIT_CODES
from turbofit.gateway.http.refusals import refusals

#: Answers of `diagnose` to a log without a failure.
NO_FAILURE = {"healthy", "memory_table"}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_what_the_program_says(page: Path) -> None:
    assert renewed(page) == page.read_text(encoding="utf-8"), "run python scripts/symptoms.py"


def test_every_kind_of_answer_has_a_message() -> None:
    assert {one.kind for one in symptoms()} == rule_kinds() - NO_FAILURE


def test_a_message_stands_once() -> None:
    assert [one for one, times in Counter(s.message for s in symptoms()).items() if times > 1] == []


def test_every_refusal_is_a_row_and_names_the_facts_of_its_sentence() -> None:
    """Codes that are no literals are looked for as such."""
    package, used = Path(__file__).parents[1] / "turbofit", set()
    for path in [*package.glob("gateway/**/*.py"), *package.glob("launch/fallback/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used |= {one.value for one in ast.walk(tree) if isinstance(one, ast.Constant)}
        for node in ast.walk(tree):
            named = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refusal"
            if not named or not isinstance(node.args[0], ast.Constant):
                continue
            facts = {one.arg for one in node.keywords} - {"retry_after", "status"}
            says = refusals()[node.args[0].value].says
            asked = {field for _, field, _, _ in Formatter().parse(says) if field}
            assert asked | {"param"} == facts | {"param"}, (path, node.lineno)
    assert refusals().keys() <= used


def test_every_exit_code_of_a_failure_is_explained() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    for code in EXIT_CODES:
        assert code in (0, 1, 2, 130) or f"\n| {code} |" in text
