"""A newer LMDeploy: what the source cites of it still stands there, and the page about it."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts.citations import ROOT, citations, digest, state
from turbofit.core.version import REFERENCE

CITATIONS = list(citations())


def test_each_has_what_stands_there() -> None:
    """A hash or words; of C++, which no wheel has, a name does. Another version is written out."""
    assert len(CITATIONS) > 140
    bare = [one for one in CITATIONS if not one.digest and not one.text]
    assert [one for one in bare if not one.path.startswith("src/")] == []
    assert [one for one in CITATIONS if one.package != "lmdeploy" and not one.version] == []


@pytest.mark.lmdeploy
@pytest.mark.parametrize("package", sorted({one.package for one in CITATIONS}))
def test_it_still_does(package: str) -> None:
    cited = [one for one in CITATIONS if one.package == package]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    installed = version(package).partition("+")[0]
    for one in cited:
        read = one.version or f"{REFERENCE}.0"
        if not one.path.startswith("src/"):
            assert read == installed, f"{one.file}:{one.line}: run python -m scripts.citations"
    moved = [
        f"{one.file}:{one.line}: {one.cited}"
        for one in cited
        if state(one, Path(str(spec.origin)).parent) not in ("equal", "unseen")
    ]
    assert moved == []


def test_a_hash_is_of_what_code_does() -> None:
    def of(text: str) -> str:
        return digest(ast.parse(text))

    plain = of("def f(a):\n    return a + 8\n")
    assert of("def f(a: int) -> int:\n    # more\n    return (a +\n            8)\n") == plain
    assert of("def f(a):\n    return a + 16\n") != plain
    assert of("if a:\n    b()\nelse:\n    c()\n") != of("if a:\n    c()\nelse:\n    b()\n")
    assert of("if a:\n    b()\nelse:\n    c()\n") != of("if a:\n    b()\n    c()\n")
    assert of("b = a[1:]\n") != of("b = a[:1]\n")
    assert of("a: int = 8\n") == of("a: float = 8\n")


def test_the_version_that_plans_are_for_stands_in_one_place() -> None:
    """`turbofit.core.version` has it; whose figures older versions have is another matter."""
    found = []
    for path in sorted((ROOT / "turbofit").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if REFERENCE not in text:
            continue
        tree = ast.parse(text)
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{path.relative_to(ROOT)}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and id(node) not in docs
            and isinstance(node.value, str) and REFERENCE in node.value
        ]  # fmt: skip
    assert found == ["turbofit/core/version.py: 0.18", "turbofit/memory/versions.py: 0.18"]
