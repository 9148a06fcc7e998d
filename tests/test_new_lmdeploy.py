"""The page about a newer LMDeploy, made of two small packages."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from scripts import new_lmdeploy
from scripts.citations import Citation
from scripts.new_lmdeploy import (
    Difference,
    Ran,
    compared,
    page,
    write_kernels,
)  # fmt: skip
from turbofit.core.presets import load_yaml
from turbofit.kernels.census import Census, Count

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
        },
    }
    for version, named in files.items():
        for name, text in named.items():
            path = tmp_path / version / "lmdeploy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    cited = [("a/same.py", "same", ""), ("a/grown.py", "grown", ""), ("a/moved.py", "Box.held", ""),
             ("a/gone.py", "", "LIMIT = 16")]  # fmt: skip
    where = "presets/engines/turbomind-0.18.yaml"
    made = [Citation(where, 15, "lmdeploy", "", path, name, "" if text else "0" * 6, text)
            for path, name, text in cited]  # fmt: skip
    monkeypatch.setattr(new_lmdeploy, "citations", lambda: iter(made))
    tables = [one for one in new_lmdeploy._TABLES
              if one[0] in ("route", "request field", "architecture", "known to us")]  # fmt: skip
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
        ("`turbomind: NewForCausalLM` is new", False),
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
    for python in ("310", "311", "312", "313"):
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
        "libraries": {"0.19.0": ["h310", "h311", "h312", "h313"]},
    }  # fmt: skip


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
