"""Each bench starts in the same way and is in the index."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
NAMES = sorted(path.name for path in BENCH.iterdir() if any(path.glob("*.py")) and path.is_dir())
INDEX = (BENCH / "README.md").read_text()
COMMANDS = re.findall(r"^\| `python -m (bench\.[\w.]+)` \|", INDEX, re.MULTILINE)


#: One process for all: most of the time they import the same.
HELP = """
import contextlib, io, json, runpy, sys
said = {}
for command in sys.argv[1:]:
    out, sys.argv = io.StringIO(), [command, "--help"]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as exc:
        said[command] = [exc.code, out.getvalue()]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_benches_answer_help() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert list(said) == list(dict.fromkeys(COMMANDS))
    for command, (code, text) in said.items():
        assert code == 0
        assert text.startswith(f"usage: python -m {command} ["), command


@pytest.mark.parametrize("name", NAMES)
def test_a_bench_is_in_the_index(name: str) -> None:
    """What is not is started by another program of its bench. By reading: some import Ray."""
    listed = {one for one in COMMANDS if one.split(".")[1] == name}
    texts = {path.stem: path.read_text() for path in (BENCH / name).glob("*.py")}
    for stem, text in texts.items():
        command = f"bench.{name}" if stem == "__main__" else f"bench.{name}.{stem}"
        others = "".join(texts[other] for other in texts if other != stem)
        if command in listed:
            assert is_program(text)
            assert f'prog="python -m {command}"' in text
            assert "description=__doc__" in text
        elif is_program(text):
            assert command in others or f'"{stem}.py"' in others, stem


def test_all_benches_are_listed_and_the_index_has_no_other() -> None:
    assert {one.split(".")[1] for one in COMMANDS} == set(NAMES)
    said = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(f"python -m {one}" in said for one in COMMANDS)


def test_benches_and_tests_share_support_alone() -> None:
    """A bench imports nothing else of the tests, in a program in a string neither."""
    of_bench = dict.fromkeys(BENCH.rglob("*.py"), "tests")
    of_support = dict.fromkeys((ROOT / "tests" / "support").rglob("*.py"), "tests|bench")
    for path, rooms in (of_bench | of_support).items():
        imports = rf"^\s*(?:from|import) ((?:{rooms})\b\S*)"
        found = re.findall(imports, path.read_text(), re.MULTILINE)
        assert all(name.split(".")[:2] == ["tests", "support"] for name in found), (path, found)


def is_program(text: str) -> bool:
    """Whether a file does something where it is started."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(text).body
    )
