"""The house itself: file sizes, and what every public name must carry."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "turbofit").rglob("*.py"))
MOST_LINES = 500
MOST_FUNCTION_LINES = 60


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_read_at_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, functions):
            lines = (node.end_lineno or 0) - node.lineno
            body = lines - len((ast.get_docstring(node) or "").splitlines())
            assert body <= MOST_FUNCTION_LINES, node.name
    for node in tree.body:
        if isinstance(node, (*functions, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def asks_for_class(tree: ast.Module, rules: set[str]) -> list[int]:
    """Lines that ask for the class of an image rule, or for what stands for it: its unit's name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            asked: list[ast.AST] = [node.args[1]]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        elif isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        else:
            continue
        names = {
            getattr(it, "id", None) or getattr(it, "attr", None)
            for one in asked
            for it in ast.walk(one)
        }
        units = (
            {"unit_name", "units_name", "vision_unit"} if isinstance(node, ast.Compare) else set()
        )
        literal = any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in asked)
        if names & rules or (literal and names & units):
            found.append(node.lineno)
    return found


def test_nobody_asks_an_image_rule_for_its_class() -> None:
    """A rule answers (`turbofit/core/images/rule.py`): so a new one is a file, not thirty edits."""
    folder = ROOT / "turbofit" / "core" / "images"
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE}
    rules = {
        node.name
        for path, tree in trees.items()
        if path.parent == folder
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Rule")
    }
    assert {"ImageRule", "BaseTileRule", "TileRule", "PatchRule"} <= rules
    for text in (
        "isinstance(rule, TileRule)", "isinstance(rule, (images.TileRule, int))",
        "isinstance(rule, AnyresRule | HdRule)", "type(rule) is PatchRule",
        "issubclass(a, TileRule)", "match rule:\n    case PatchRule(): pass",
        "limits.vision_unit == 'tile'",
    ):  # fmt: skip
        assert asks_for_class(ast.parse(text), rules), text
    assert not asks_for_class(ast.parse("limits.vision_unit is None or isinstance(x, int)"), rules)
    found = {
        str(path.relative_to(ROOT)): lines
        for path, tree in trees.items()
        if path.parent != folder and (lines := asks_for_class(tree, rules))
    }
    assert found == {}


def test_no_machine_path_or_registry_is_committed() -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    bad = re.compile(r"(?<![\w.])/(work|farm|root|home)/\w")
    found = []
    for name in names:
        path = ROOT / name
        if path.suffix in {".py", ".c", ".h", ".md", ".toml", ".yaml", ".sh", ".txt"}:
            text = path.read_text(errors="replace")
            found += [name for _ in bad.finditer(text)]
    allowed = {"tests/test_house.py"}
    assert set(found) - allowed == set()
