"""Each bench starts in the same way, is in the index, and imports of the tests what both need."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
NAMES = sorted(path.name for path in BENCH.iterdir() if any(path.glob("*.py")) and path.is_dir())
INDEX = (BENCH / "README.md").read_text()
COMMANDS = re.findall(r"^\| `python -m (bench\.[\w.]+)` \|", INDEX, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_bench_answers_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m bench.{name}")
    for program in programs(name):
        assert f"python -m bench.{name}.{program}\n" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_bench_is_in_the_index(name: str) -> None:
    names = [f"bench.{name}.{program}" for program in programs(name)] or [f"bench.{name}"]
    found = [one for one in COMMANDS if one.split(".")[1] == name]
    assert found == names


def test_the_index_has_no_other_bench() -> None:
    assert {one.split(".")[1] for one in COMMANDS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_program_of_a_bench_is_listed_and_has_options(name: str) -> None:
    """By reading them: to import some takes Ray or LMDeploy."""
    listed = programs(name)
    for program in listed:
        text = (BENCH / name / f"{program}.py").read_text()
        assert f'prog="python -m bench.{name}.{program}"' in text
        assert "description=__doc__" in text
        assert is_program(text)
    others = {path.stem: path.read_text() for path in (BENCH / name).glob("*.py")}
    for stem in set(others) - {*listed, "__main__"} if listed else ():
        started = f"bench.{name}.{stem}", f'"{stem}.py"'
        elsewhere = "".join(text for other, text in others.items() if other != stem)
        assert not is_program(others[stem]) or any(one in elsewhere for one in started), stem


@pytest.mark.parametrize(
    "path", sorted(BENCH.rglob("*.py")), ids=lambda p: str(p.relative_to(BENCH))
)
def test_a_bench_imports_of_the_tests_what_both_need(path: Path) -> None:
    """So does a program in a string that it starts."""
    found = re.findall(r"^\s*(?:from|import) (tests\b\S*)", path.read_text(), re.MULTILINE)
    assert all(name.startswith("tests.support.") for name in found), found


def test_what_both_need_imports_no_test_and_no_bench() -> None:
    for path in (ROOT / "tests" / "support").rglob("*.py"):
        found = re.findall(
            r"^\s*(?:from|import) ((?:tests|bench)\S*)", path.read_text(), re.MULTILINE
        )
        assert all(name.startswith("tests.support.") for name in found), (path, found)


def programs(name: str) -> tuple[str, ...]:
    """Those that the entry of a bench lists; none where the entry is the bench."""
    for node in ast.parse((BENCH / name / "__main__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROGRAMS":
            found: tuple[str, ...] = ast.literal_eval(node.value)
            return found
    return ()


def is_program(text: str) -> bool:
    """Whether a file does something where it is started."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(text).body
    )
