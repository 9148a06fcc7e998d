"""The house itself: caps on the whole, files that are subjects, imports without a circle."""

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

from turbofit.core.plan import EngineName, EnginePlan, Plan

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "turbofit").rglob("*.py"))
#: Statements of each tree: a statement is no docstring and no import. Rooms have no caps: such a
#: cap buys density.
MOST_STATEMENTS = {"turbofit": 35_500, "tests": 30_400, "bench": 6_000}
MOST_FILES = 420
#: Statements of more nodes than these, without the statements inside them and without tables (what
#: is assigned at a module's top): how many there may be.
LONG_STATEMENT = 120
MOST_LONG_STATEMENTS = 15
#: Conditional expressions inside others or as statements, texts and tuples times conditions.
MOST_FOLDED = 0
MOST_LINES = 800
MOST_FUNCTION_LINES = 60
#: Functions that decide so many things and more. One of fifteen decisions that tells one story is
#: better than five pieces that share all state.
MOST_DECIDING = {15: 40, 20: 0}
#: The fewest decisions of a file of logic, which has a test file of its name.
LOGIC = 8
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


def statements(block: ast.AST) -> int:
    """Return the number of statements inside, without imports and docstrings."""
    count = 0
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(block, field, ()):
            left_out = isinstance(node, (ast.Import, ast.ImportFrom)) or is_docstring(node)
            count += isinstance(node, ast.stmt) and not left_out
            count += statements(node)
    return count


def test_the_whole_keeps_to_its_caps() -> None:
    now = Counter[str]()
    for folder in MOST_STATEMENTS:
        for path in (ROOT / folder).rglob("*.py"):
            now[folder] += statements(tree_of(path))
    assert {name: now[name] for name in now if now[name] > MOST_STATEMENTS[name]} == {}
    assert len(PACKAGE) <= MOST_FILES


def own_nodes(statement: ast.stmt) -> int:
    """Return the number of a statement's nodes, without the statements inside it."""
    count, nodes = 1, list(ast.iter_child_nodes(statement))
    for node in nodes:
        if not isinstance(node, ast.stmt):
            count += 1
            nodes += ast.iter_child_nodes(node)
    return count


def is_long(node: ast.AST) -> bool:
    blocks = (ast.Import, ast.ImportFrom, ast.ClassDef, *Function)
    if not isinstance(node, ast.stmt) or isinstance(node, blocks) or is_docstring(node):
        return False
    is_table = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.col_offset == 0
    return not is_table and own_nodes(node) > LONG_STATEMENT


def is_text_or_tuple(node: ast.AST) -> bool:
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_text or isinstance(node, (ast.JoinedStr, ast.Tuple))


def is_condition(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("bool", "any", "all")
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    return isinstance(node, (ast.Compare, ast.BoolOp, ast.Attribute, ast.Name))


def is_folded(node: ast.AST) -> bool:
    """Two thoughts in one expression: a name, or two lines, would say each."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.IfExp)
    if isinstance(node, ast.IfExp):
        return any(isinstance(it, ast.IfExp) for it in (node.test, node.body, node.orelse))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        sides = ((node.left, node.right), (node.right, node.left))
        return any(is_text_or_tuple(text) and is_condition(other) for text, other in sides)
    return False


def test_a_line_has_one_thought() -> None:
    text = "a if b else (c if d else e)\nf() if g else h\nx = 'text' * (y > 1)\nz = 'a' * 3"
    assert sum(map(is_folded, ast.walk(ast.parse(text)))) == 4
    assert own_nodes(ast.parse("if a:\n    b = c + d").body[0]) == 3
    places = [(path, node) for path in PACKAGE for node in nodes_of(path)]
    folded = [f"{name_of(path)}:{node.lineno}" for path, node in places if is_folded(node)]
    assert len(folded) <= MOST_FOLDED, folded
    long = [f"{name_of(path)}:{node.lineno}" for path, node in places if is_long(node)]
    assert len(long) <= MOST_LONG_STATEMENTS, long


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


def test_a_file_of_logic_has_a_test_file_of_its_name() -> None:
    """`turbofit/ROOM/name.py` is tested in `tests/ROOM/test_name.py`."""
    missing = []
    for path in PACKAGE:
        functions = [node for node in nodes_of(path) if isinstance(node, Function)]
        twin = ROOT / "tests" / path.relative_to(ROOT / "turbofit").with_name(f"test_{path.name}")
        if sum(map(decisions, functions)) >= LOGIC and not twin.exists():
            missing.append(name_of(twin))
    assert missing == []


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
    """`Engine` answers for planning, and `Backend` for a plan."""
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


def test_only_planning_makes_or_changes_a_promise() -> None:
    """Stages after planning replace a plan's engines, and add to what is said."""
    found = []
    for path in PACKAGE:
        for node in nodes_of(path):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            changes = {keyword.arg for keyword in node.keywords}
            # The bounds of one image or video may be lower than the promise.
            plans = name in ("replace", "Plan") and "bounds" not in map(ast.unparse, node.args)
            if name == "Promise" or (plans and "promise" in changes):
                found.append(name_of(path))
    assert found
    assert {name for name in found if not name.startswith("turbofit/planning/")} == set()
    assert found.count("turbofit/planning/plan_document.py") == 2, "one function makes it"


def test_settings_are_asked_of_an_engine() -> None:
    """A plan has no settings or cache of its own, which would be those of one of its engines."""
    own = {"settings", "kv", "units_per_forward", "command", "device_map", "gpus", "requests"}
    assert own.isdisjoint(Plan.__struct_fields__)
    assert own < set(EnginePlan.__struct_fields__)
    asked = re.compile(r"\bplan\.(settings|kv|units_per_forward|gpus)\b")
    assert [name_of(path) for path in PACKAGE if asked.search(path.read_text())] == []


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
