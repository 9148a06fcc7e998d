"""A newer LMDeploy: what the source cites of it still stands there, and the page about it."""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from scripts import new_lmdeploy
from scripts.citations import ROOT, Citation, citations, digest, state
from scripts.new_lmdeploy import Difference, Ran, compared, page, write_kernels
from turbofit.core.presets import load_yaml
from turbofit.core.version import REFERENCE
from turbofit.machine.kernels.census import Census, Count

Patch = pytest.MonkeyPatch

ROUTES = 'router.{method}("{path}")\nclass ChatCompletionRequest:\n    {field}: int\n'


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: Patch) -> tuple[Path, Path]:
    """0.18.0 and 0.19.0: one function grew, one moved, one file is gone, and tables differ."""
    files = {
        "0.18.0": {
            "a/same.py": "def same(): return 1\n",
            "a/grown.py": "def grown(x):\n    return x + 8\n",
            "a/moved.py": "class Box:\n    def held(self): return 3\n",
            "a/gone.py": "LIMIT = 16  # words\n",
            "serve/protocol.py": ROUTES.format(method="get", path="/health", field="seed"),
            "turbomind/supported_models.py": "ARCHS = dict(a=1)\nX = {'LlamaForCausalLM': 1}\n",
        },
        "0.19.0": {
            "a/same.py": "def same():\n    # one\n    return 1\n",
            "a/grown.py": "def grown(x):\n    return x + 16\n",
            "b/other.py": "class Box:\n    def held(self): return 3\n",
            "serve/protocol.py": ROUTES.format(method="post", path="/v2/new", field="warp"),
            "turbomind/supported_models.py": "X = {'LlamaForCausalLM': 1, 'NewForCausalLM': 2}\n",
            "turbomind/models/draft.py": "class Draft: ...\n",
        },
    }
    for release, named in files.items():
        for name, text in named.items():
            path = tmp_path / release / "lmdeploy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    cited = [("a/same.py", "same", ""), ("a/grown.py", "grown", ""), ("a/moved.py", "Box.held", ""),
             ("a/gone.py", "", "LIMIT = 16")]  # fmt: skip
    where = "presets/engines/turbomind-0.18.yaml"
    made = [Citation(where, 15, "lmdeploy", "", path, name, "" if text else "0" * 6, text)
            for path, name, text in cited]  # fmt: skip
    monkeypatch.setattr(new_lmdeploy, "citations", lambda: iter(made))
    kinds = ("route", "request field", "architecture", "weights", "known to us")
    tables = [one for one in new_lmdeploy._TABLES if one[0] in kinds]
    monkeypatch.setattr(new_lmdeploy, "_TABLES", tables)
    monkeypatch.setattr(new_lmdeploy, "_missing", lambda _: "")
    return tmp_path / "0.18.0", tmp_path / "0.19.0"


def test_what_changed_moved_and_went_is_named_with_what_rests_on_it(
    wheels: tuple[Path, Path],
) -> None:
    found = list(compared(*wheels))
    code = {one.what: one.rests for one in found if one.kind == "cited code"}
    assert list(code) == [
        "`a/grown.py::grown` changed (+1 \N{MINUS SIGN}1 lines)",
        "`a/moved.py::Box.held` is gone: in b/other.py now, as it was",
        "`a/gone.py LIMIT = 16` is gone",
    ]
    assert set(code.values()) == {"presets/engines/turbomind-0.18.yaml:15 slab_fill"}
    tables = [(one.what, bool(one.known)) for one in found if one.kind != "cited code"]
    assert tables == [
        ("`GET /health` is gone", True), ("`POST /v2/new` is new", False),
        ("`ChatCompletionRequest.seed` is gone", True),
        ("`ChatCompletionRequest.warp` is new", False),
        ("`turbomind: NewForCausalLM` is new", False), ("`models/draft.py` is new", False),
    ]  # fmt: skip


def test_what_a_person_must_decide_stands_first(wheels: tuple[Path, Path]) -> None:
    ran = [Ran("rest", "FAILED tests/a.py::test_b", 3.0), Ran("grammars", "", 4.0)]
    text = page("0.18.0", "0.19.0", [*compared(*wheels), Difference("x", "y", known="z")], ran)
    decide, known, equal = text.split("\n## ")[1:]
    assert "- rest on 0.19.0: FAILED tests/a.py::test_b" in decide
    assert "/v2/new" in decide
    assert "slab_fill" in decide
    assert "- x: y. z" in known
    assert "1 of 4 cited places" in equal
    assert "- grammars: 4 s" in equal


def test_the_kernels_of_a_release_are_written(tmp_path: Path, monkeypatch: Patch) -> None:
    counts = {"gemm": {"80": Count(code=3), "90a": Count(code=1, empty=2)}, "KV cache": {}}
    census = Census(library="_turbomind.so", architectures=("80", "90a"), ptx=(), families=counts)
    for python in ("310", "311", "312", "313", "314"):
        wheel = tmp_path / f"wheels/lmdeploy-0.19.0-cp{python}-any.whl"
        wheel.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel, "w") as file:
            record = f"lmdeploy/a.py,sha256=x,1\nlmdeploy/t/_turbomind.cp.so,sha256=h{python},9\n"
            file.writestr("lmdeploy-0.19.0.dist-info/RECORD", record)
    monkeypatch.setattr(new_lmdeploy, "_library", lambda _: Path("_turbomind.so"))
    monkeypatch.setattr(new_lmdeploy, "take_census", lambda _: census)
    monkeypatch.setattr(new_lmdeploy, "preset_path", lambda _, name: tmp_path / f"{name}.yaml")
    assert load_yaml(write_kernels(Path("0.19.0"), tmp_path)) == {
        "library": "_turbomind.so", "architectures": "80 90a", "ptx": "",
        "families": {"gemm": "3 1+2", "KV cache": "0 0"},
        "libraries": {"0.19.0": ["h310", "h311", "h312", "h313", "h314"]},
    }  # fmt: skip


@pytest.mark.exhaustive  # whoever prepares for a new LMDeploy reads them
@pytest.mark.lmdeploy
def test_tables_are_read_of_a_whole_wheel() -> None:
    import lmdeploy

    wheel = Path(lmdeploy.__file__).parents[1]
    read = {kind: reads(wheel) for kind, reads, _ in new_lmdeploy._TABLES
            if kind not in ("requirement", "kernels", "library")}  # fmt: skip
    assert read["route"].keys() > {"POST /v1/chat/completions", "POST /generate", "GET /health"}
    assert read["option"]["--cache-max-entry-count"] == "0.8"
    assert "ChatCompletionRequest.min_new_tokens" in read["request field"]
    assert "pytorch: InternVLChatModel" in read["architecture"]


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
