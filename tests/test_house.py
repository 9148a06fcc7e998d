"""The house itself: budgets of its rooms, files that are subjects, imports without a circle."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest

from turbofit.core.plan import EngineName

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "turbofit").rglob("*.py"))
#: Statements of each room, of tests and of benches: a statement is no docstring and no import. A
#: budget goes down only; a feature that is added pays for itself in its room.
BUDGETS = {
    "core": 2_500, "machine": 1_596, "model": 2_450, "memory": 3_150, "planning": 3_900,
    "logs": 1_499, "rehearsal": 2_799, "gateway": 4_000, "serving": 4_200, "measure": 1_216,
    "report": 1_500, "cli": 1_680, "batch_jobs": 446, "tests": 24_500, "bench": 4_951,
}  # fmt: skip
MOST_LINES = 800
MOST_FUNCTION_LINES = 60
#: Functions that decide so many things and more. One of fifteen decisions that tells one story is
#: better than five pieces that share all state.
MOST_DECIDING = {15: 40, 20: 0}
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def room_of(path: Path) -> str:
    first, *inner = path.relative_to(ROOT).parts
    if first != "turbofit":
        return first
    if len(inner) == 1:
        return "doors"
    return inner[0]


def statements(block: ast.AST) -> int:
    """Return the number of statements inside, without imports and docstrings."""
    count = 0
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(block, field, ()):
            left_out = isinstance(node, (ast.Import, ast.ImportFrom)) or is_docstring(node)
            count += isinstance(node, ast.stmt) and not left_out
            count += statements(node)
    return count


def test_rooms_keep_to_their_budgets() -> None:
    now = Counter[str]()
    for folder in ("turbofit", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            now[room_of(path)] += statements(ast.parse(path.read_text()))
    doors = now.pop("doors")
    assert doors <= 250
    assert {room: count for room, count in now.items() if count > BUDGETS.get(room, 0)} == {}


def test_a_file_is_a_subject() -> None:
    """It can be read at one sitting, and says first what it is for."""
    found = []
    for path in PACKAGE:
        if path.read_text().count("\n") > MOST_LINES or not ast.get_docstring(tree_of(path)):
            found.append(name_of(path))
        for node in nodes_of(path):
            if isinstance(node, Function):
                lines = (node.end_lineno or 0) - node.body[0].lineno
                if lines - len((ast.get_docstring(node) or "").splitlines()) > MOST_FUNCTION_LINES:
                    found.append(f"{name_of(path)}: {node.name}")
    assert found == []


def decisions(function: ast.AST) -> int:
    """Branches, loops, `with`s, and parts of conditions; a function inside counts for itself."""
    single = (
        ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith,
        ast.ExceptHandler, ast.match_case,
    )  # fmt: skip
    count, nodes = 0, list(ast.iter_child_nodes(function))
    for node in nodes:
        if isinstance(node, (*Function, ast.ClassDef)):
            continue
        nodes += ast.iter_child_nodes(node)
        count += isinstance(node, single)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
    return count


def test_functions_decide_few_things() -> None:
    text = "def f(a):\n    def g():\n        if a: pass\n    return [b for b in a if b and a] or 1"
    assert decisions(ast.parse(text).body[0]) == 4
    found = sorted(
        (decisions(node), f"{name_of(path)}: {node.name}")
        for path in PACKAGE
        for node in nodes_of(path)
        if isinstance(node, Function)
    )
    for many, most in MOST_DECIDING.items():
        names = [name for count, name in found if count >= many]
        assert len(names) <= most, names


def test_imports_make_no_circle() -> None:
    """Inside rooms too, and also of imports in functions and for types alone."""
    names = {module_of(path) for path in PACKAGE}
    imports: dict[str, set[str]] = {}
    for path in PACKAGE:
        found: set[str] = set()
        for node in nodes_of(path):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inside & names) or {node.module}
        imports[module_of(path)] = (found & names) - {module_of(path)}
    assert sum(map(len, imports.values())) > len(imports), "imports are found"
    TopologicalSorter(imports).prepare()  # its CycleError names the files


def asks_for(node: ast.AST, names: set[str]) -> bool:
    """A comparison, a class check or a case of a match that contains one of ``names``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        node = node.args[1]
    elif not isinstance(node, (ast.Compare, ast.MatchClass, ast.MatchValue)):
        return False
    return bool(names & set(re.findall(r"\w+", ast.unparse(node))))


def test_nobody_asks_an_image_rule_for_its_class() -> None:
    """A rule answers (`turbofit/core/images/rule.py`): so a new one is a file, not thirty edits."""
    folder = ROOT / "turbofit" / "core" / "images"
    rules = {
        node.name
        for path in folder.glob("*.py")
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Rule")
    }
    assert {"ImageRule", "BaseTileRule", "TileRule", "PatchRule"} <= rules
    others = [path for path in PACKAGE if path.parent != folder]
    found = [name_of(path) for path in others for node in nodes_of(path) if asks_for(node, rules)]
    assert found == []


def test_nobody_asks_an_engine_for_its_name() -> None:
    """`Engine` answers for planning, and `PlannedEngine` for a plan."""
    names = set(get_args(EngineName))
    found = set()
    for path in PACKAGE:
        for node in nodes_of(path):
            if isinstance(node, ast.Compare):
                sides: list[ast.AST] = [node.left, *node.comparators]
            elif isinstance(node, ast.MatchValue):
                sides = [node.value]
            else:
                continue
            for side in sides:
                texts = {it.value for it in ast.walk(side) if isinstance(it, ast.Constant)}
                if texts & names and texts <= names | {"auto"}:
                    found.add(name_of(path))
    answers = ("core/plan.py", "memory/account.py", "memory/engines.py")
    allowed = tuple(f"turbofit/{it}" for it in (*answers, *(f"memory/{name}/" for name in names)))
    assert [name for name in found if not name.startswith(allowed)] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git here: an sdist")
def test_no_machine_path_or_registry_is_committed() -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    bad = re.compile(r"(?<![\w.])/(work|farm|root|home)/\w")
    kinds = {".py", ".c", ".h", ".md", ".toml", ".yaml", ".sh", ".txt"}
    paths = [ROOT / name for name in names if Path(name).suffix in kinds]
    found = {name_of(it) for it in paths if it.exists() and bad.search(it.read_text("utf8"))}
    assert found <= {"tests/test_house.py"}


def test_ray_is_imported_in_one_module() -> None:
    """Ray moves its private calls between versions: one file is to be looked at then."""
    importing = re.compile(r"^\s*(import|from) ray\b|import(_module|__)\([\"']ray\b", re.MULTILINE)
    found = [path for path in PACKAGE if importing.search(path.read_text())]
    assert found == [ROOT / "turbofit" / "serving" / "cluster" / "ray_adapter.py"]
