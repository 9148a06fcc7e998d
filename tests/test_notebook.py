"""notebooks/free-cards.ipynb: its cells run on a pretend T4, as far as they can without weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import HANG
from turbofit import api

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "notebooks" / "free-cards.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(one["source"]) for one in NOTEBOOK["cells"] if one["cell_type"] == "code"]
TEXT = "\n".join("".join(one["source"]) for one in NOTEBOOK["cells"])
#: IPython's `!`.
HEAD = """
import subprocess, sys
def shell(line):
    sys.stdout.flush()
    subprocess.run(line, shell=True)
"""


def program(*, calibrates: bool) -> str:
    """The cells as a script; what downloads, or takes minutes, is left out."""
    lines = []
    for line in "\n".join(CELLS).replace('SOURCE = ""', 'SOURCE = "set"').splitlines():
        if line.startswith(("!pip", "!cat")) or ("calibrate" in line and not calibrates):
            continue
        told = line.replace("turbofit calibrate {MODEL}",
                            "turbofit calibrate {MODEL} --pretend --on 1xt4")  # fmt: skip
        command = told.removeprefix("!").replace("turbofit", "{sys.executable} -m turbofit", 1)
        lines.append(f"shell(f{command!r})" if line.startswith("!") else line)
    return HEAD + "\n".join(lines) + "\n"


def ran(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "cells.py").write_text(script)
    words = ["--on", "1xt4", "--model", "qwen2-vl-2b", "--", sys.executable, "cells.py"]
    env = {**os.environ, "XDG_STATE_HOME": str(folder), "TURBOFIT_LEASES": str(folder / "leases")}
    return subprocess.run(
        [sys.executable, "-m", "turbofit", "pretend", *words],
        cwd=folder, env=env, capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.lmdeploy
def test_its_cells_run(tmp_path: Path) -> None:
    done = ran(tmp_path, program(calibrates=False))
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("Tesla T4", "fits: Qwen2-VL-2B-Instruct"):
        assert words in done.stdout
    assert "nothing was served yet" in done.stderr  # `share` has no run to tell of
    # And its last cells.
    whole = program(calibrates=True)
    asked = whole.index("from PIL"), whole.index("shell(", whole.index("with turbofit"))
    done = ran(tmp_path, whole[: asked[0]] + whole[asked[1] :])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Calibration of Qwen2-VL-2B-Instruct" in done.stdout
    assert "ran on pretend GPUs: it says nothing of any card" in done.stderr


def test_it_installs_nothing_until_its_source_is_set() -> None:
    cell = next(one for one in CELLS if "!pip" in one)
    before, _, line = cell.partition("!pip")
    assert line.endswith('"turbofit[lmdeploy] @ {SOURCE}"')
    with pytest.raises(AssertionError, match="set SOURCE to git"):
        exec(before, {})
    exec(before.replace('""', '"git+https://example.com/turbofit"', 1), {})


def test_the_models_of_its_table_fit() -> None:
    table = re.findall(r"^\| (one T4|one L4|two T4s)[^|]*\| ([^|]+) \|$", TEXT, re.MULTILINE)
    assert [card for card, _ in table] == ["one T4", "one L4", "two T4s"]
    models: list[str] = []
    for (card, cell), spec in zip(table, ("1xt4", "1xl4", "2xt4"), strict=True):
        models += re.findall(r"`([\w.-]+)`", cell)
        for model in models:
            assert api.plan(model, on=spec).fits, (card, model)
