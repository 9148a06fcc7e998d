"""docs/promises.md: each promise names tests that the default check runs."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "promises.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
NAMED = sorted(set(re.findall(r"`([\w/]*test_\w+\.py(?:::\w+)?)`", PAGE)))


#: Marks of tests that the default check does not run.
LEFT_OUT = {"pytest.mark.skip", "pytest.mark.exhaustive"}


@cache
def run_tests(path: Path) -> set[str]:
    """Names of a file's tests, but for those that the default check leaves out."""
    found = set[str]()
    tree = ast.parse(path.read_text())
    inside = [node for one in tree.body if isinstance(one, ast.ClassDef) for node in one.body]
    for node in (*tree.body, *inside):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            marks = {ast.unparse(mark).partition("(")[0] for mark in node.decorator_list}
            if node.name.startswith("test_") and not marks & LEFT_OUT:
                found.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node).startswith("pytestmark = "):
            marks = {ast.unparse(one) for one in ast.walk(node) if isinstance(one, ast.Attribute)}
            if marks & LEFT_OUT:
                return set()
    return found


def test_each_promise_names_what_holds_it_and_the_page_is_short() -> None:
    assert [int(number) for number, _ in PROMISES] == list(range(1, len(PROMISES) + 1))
    assert 60 <= len(PROMISES) <= 80
    assert [number for number, text in PROMISES if "<br>Tests: `" not in text] == []
    assert len(PAGE.splitlines()) <= 400


def test_what_holds_a_promise_is_run() -> None:
    named = [name.partition("::") for name in NAMED]
    run = {file: run_tests(TESTS / file) for file, _, _ in named}
    assert [f"{file}::{test}" for file, _, test in named if not run[file] >= {test} - {""}] == []
    assert [file for file, tests in run.items() if not tests] == []


def test_what_the_default_check_leaves_out_holds_no_promise() -> None:
    assert "test_a_planted_bug_is_found" not in run_tests(TESTS / "bench" / "test_simulation.py")
