"""`docs/environment.md` names the environment variables that turbofit reads or sets, no other."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What an environment is called in the code: `os.environ`, `environ`, `env`, `sources.environ`.
_ENVIRONMENTS = ("env", "environ", "environment")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]+")
#: Functions that set a variable whose name, their second argument, the caller gives.
_SETTERS = ("put_first",)
_SETS_ALL = ("_set_environment",)

Known = dict[str, list[str]]


class Variables(ast.NodeVisitor):
    """What one module reads and sets; `unknown` are lines whose variable it cannot tell."""

    def __init__(self, text: str) -> None:
        self.read: set[str] = set()
        self.set: set[str] = set()
        self.unknown: list[int] = []
        tree = ast.parse(text)
        self._known = _constants(tree) | _imported(tree)
        self._function, self._returns = "", ""
        self.visit(tree)

    def visit(self, node: ast.AST) -> None:
        for one in getattr(node, "generators", ()):  # of a comprehension
            self._bind(one.target, one.iter)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self._function, self._returns
        self._function = node.name
        self._returns = ast.unparse(node.returns) if node.returns else ""
        self.generic_visit(node)
        self._function, self._returns = outer

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if _is_environment(node.value) and not isinstance(node.ctx, ast.Del):
            self._add(self.read if isinstance(node.ctx, ast.Load) else self.set, node.slice)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and _is_environment(called.value):
            if called.attr in ("get", "pop"):
                self._add(self.read, node.args[0])
            elif called.attr == "setdefault":
                self._add(self.set, node.args[0])
            elif called.attr == "update":
                self._all(node.args[0])
        elif isinstance(called, ast.Name) and called.id in _SETTERS:
            self._add(self.set, node.args[1])
        elif isinstance(called, ast.Name) and called.id in _SETS_ALL:
            self._all(node.args[0])
        for one in node.keywords:
            if one.arg in _ENVIRONMENTS:
                self._all(one.value)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if isinstance(node.ops[0], ast.In) and _is_environment(node.comparators[0]):
            self._add(self.read, node.left)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        keys = node.left.func if isinstance(node.left, ast.Call) else node.left
        if isinstance(keys, ast.Attribute) and _is_environment(keys.value):
            self._add(self.read, node.right)  # os.environ.keys() & {"A", "B"}
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(map(_is_environment, node.targets)):
            self._all(node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if _is_environment(node.target) and node.value is not None:
            self._all(node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if _is_environment(node.target):
            self._all(node.value)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if self._returns == "dict[str, str]" and node.value is not None:
            self._all(node.value)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "environment":
                self._all(value)  # of a manifest
        self.generic_visit(node)

    def _bind(self, target: ast.expr, values: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._known[target.id] = _strings(values, self._known)

    def _all(self, node: ast.expr) -> None:
        """The keys of a dict that becomes an environment."""
        for inner in ast.walk(node):
            for key in inner.keys if isinstance(inner, ast.Dict) else ():
                if key is not None:
                    self._add(self.set, key)

    def _add(self, where: set[str], key: ast.expr) -> None:
        names = _strings(key, self._known)
        if not names and self._function not in _SETTERS:
            self.unknown.append(key.lineno)
        where.update(filter(_VARIABLE.fullmatch, names))


def _is_environment(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in _ENVIRONMENTS


def _constants(tree: ast.Module) -> Known:
    """Strings, and tuples of them, that a module or a class has a name for."""
    known: Known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            values = _strings(node.value, {})
            known |= {one.id: values for one in targets if isinstance(one, ast.Name) and values}
    return known


@cache
def _constants_of(module: str) -> Known:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return _constants(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _imported(tree: ast.Module) -> Known:
    return {
        one.asname or one.name: _constants_of(node.module)[one.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("turbofit.")
        for one in node.names
        if one.name in _constants_of(node.module or "")
    }


def _strings(node: ast.expr, known: Known) -> list[str]:
    """The strings that an expression may be; none where nobody can tell."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return [text for one in node.elts for text in _strings(one, known)]
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return known.get(name, [])


def modules() -> Iterator[tuple[str, Variables]]:
    """Every module of the package."""
    for path in sorted((ROOT / "turbofit").rglob("*.py")):
        yield str(path.relative_to(ROOT)), Variables(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def used() -> dict[str, str]:
    """How each variable is used: ``read``, ``set`` or ``read, set``; in Python, C and Compose."""
    found: dict[str, set[str]] = defaultdict(set)
    for _, variables in modules():
        for name in variables.read:
            found[name].add("read")
        for name in variables.set:
            found[name].add("set")
    if any("expanduser(" in path.read_text("utf-8") for path in (ROOT / "turbofit").rglob("*.py")):
        found["HOME"].add("read")
    compose = (ROOT / "presets" / "export" / "compose.template").read_text(encoding="utf-8")
    for name in re.findall(r"^ +([A-Z][A-Z0-9_]+): ", compose, re.MULTILINE):
        found[name].add("set")
    for path in (ROOT / "turbofit").rglob("*.c"):
        for name in re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")):
            found[name].add("read")
    return {name: ", ".join(sorted(how)) for name, how in sorted(found.items())}


def test_each_access_tells_its_variable() -> None:
    found = {name for name, one in modules() if one.unknown}
    # each option's, which the page says once
    assert found == {
        f"turbofit/cli/{name}.py" for name in ("command", "main", "options/option_variables")
    }


def test_the_table_is_what_the_code_does(used: dict[str, str]) -> None:
    rows = re.findall(
        r"^\| `([A-Z][A-Z0-9_]+)` \| ([a-z, ]+) \| \S",
        (ROOT / "docs" / "environment.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == len(dict(rows)), "a variable stands twice"
    assert dict(sorted(rows)) == used


def test_every_way_to_use_a_variable_is_seen() -> None:
    seen = Variables(
        """import os
NAMES = ("A1", "A2")
class Hub:
    key = "B1"
    def home(self): return os.environ.get(self.key)
def use(environ, env, given, path) -> dict[str, str]:
    for name in NAMES: environ.get(name)
    said = {name: os.environ[name] for name in ("A3", "A4")}
    x = environ["C1"], environ.pop("C2", ""), "C3" in environ, os.environ.keys() & {"C4"}
    env["D1"] = env.setdefault("D2", "0")
    env |= {"E1": "1", **{"E2": x}}
    put_first(env, "F1", "x")
    run(env={**os.environ, "G1": ""}, dtypes={"BF16": 2}, text={"environment": {"H1": ""}})
    if path: return {**env, "I1": "1"}
    return env[given]
"""
    )
    assert sorted(seen.read) == ["A1", "A2", "A3", "A4", "B1", "C1", "C2", "C3", "C4"]
    assert sorted(seen.set) == ["D1", "D2", "E1", "E2", "F1", "G1", "H1", "I1"]
    assert seen.unknown == [15]
