"""bench/gpu itself, run once to its end on a pretend card, and what it wrote held against plans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import stages
from tests.pretend.cuda_torch import CUDA_PATH, ROOT
from tests.waiting import HANG

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.lmdeploy,
    pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch"),
]
MIB = 1 << 20
ONLY = (
    "a-(constants|context|handles|pool|free)|b-qwen2-vl-2b-turbomind-plan"
    "|b-llava-1.5-7b-pytorch-plan|c-qwen2-vl-7b-turbomind-plan"
)
#: A machine may be ten times slower than the one that this was written on.
PATIENT = ("--seconds", "1500")


def bench(folder: Path, path: str, *words: str, before: tuple[str, ...] = ()) -> str:
    ran = subprocess.run(
        [*before, sys.executable, "-m", "bench.gpu", *words, *PATIENT],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder, capture_output=True, text=True, timeout=6 * HANG, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    pretend = (sys.executable, "-m", "turbofit", "pretend", "--on", "1xrtx3090", "--")
    bench(
        folder, f"{CUDA_PATH}:{ROOT}", "--out", str(folder / "out"), "--stages", "a,b,c",
        "--requests", "8", "--no-rehearse", "--only", ONLY, before=pretend,
    )  # fmt: skip
    return folder / "out"


def read(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return found


def test_constants(out: Path) -> None:
    took = {one["mark"]: one.get("took") for one in read(out, "a-constants")["marks"]}
    assert took["context"] == 360 * MIB  # what this pretend card's preset says
    assert sum(took[name] for name in ("first_kernel", "cublas_small", "convolution")) == 0
    (gpu,) = read(out, "machine")["machine"]["gpus"]
    assert gpu["name"] == "NVIDIA GeForce RTX 3090"
    assert "uuid" not in gpu


def test_what_the_runtimes_take(out: Path) -> None:
    for part in stages.CONTEXTS:
        marks = {one["mark"]: one for one in read(out, "a-context")[part]["marks"]}
        assert marks["first"]["used"] == 360 * MIB + 2 * MIB, part  # the preset's, and a page
    marks = {one["mark"]: one for one in read(out, "a-handles")["handles"]["marks"]}
    assert marks["used_15"]["took"] == 0  # a pretend card has no workspaces
    marks = {one["mark"]: one for one in read(out, "a-pool")["pool"]["marks"]}
    assert marks["growth"]["steps"][:2] == [2 * MIB, 4 * MIB]
    assert marks["default_33_mib"]["kept_after_wait"] == 0


def test_engines(out: Path) -> None:
    free = read(out, "a-free-qwen2-vl-2b-turbomind")
    # A pretend card has the preset's context and no cuBLAS workspaces.
    assert free["unseen"] == free["estimated"]["cuda_context"]
    plan = read(out, "b-qwen2-vl-2b-turbomind-plan")
    assert plan["outcome"] == "survived"
    assert 0 <= plan["over_share_of_card"] <= 0.02
    rows = {row["phase"]: row for row in plan["phases"]}
    assert rows["cache"]["rehearsed"] is None
    speed = read(out, "c-qwen2-vl-7b-turbomind-plan")
    assert speed["direct"]["answered"] == speed["gateway"]["answered"] == 8


@pytest.mark.skipif(version("transformers") < "5", reason="an image of LLaVA works there")
def test_an_engine_that_cannot_is_said_and_not_tried(out: Path) -> None:
    # Beside Transformers 5.0 to 5.20 LMDeploy fails at every image of LLaVA.
    said = "pytorch fails at every image"
    assert said in read(out, "not-run")["b-llava-1.5-7b-pytorch-plan"]
    assert said in (out / "SUMMARY.md").read_text()


def test_what_was_measured_is_held_against_forecast_and_rehearsal(
    out: Path, tmp_path: Path
) -> None:
    # Without a GPU, and not on a pretend one.
    words = ("--held-against", str(out), "--out", str(tmp_path / "held"))
    said = bench(tmp_path, str(ROOT), *words)
    facts = read(tmp_path / "held", "held")
    seen = {one["key"]: one for one in facts["constants"]}
    # What differs between a pretend card and a real one is planted: no workspaces, no kernels.
    assert seen["cublas_handle.value.default"]["value"] == 0
    assert seen["torch_kernels.value"]["value"] <= 2 * MIB
    assert seen["pool_growth.value.most"]["value"] <= 0
    assert (seen["context_mib.high"]["value"], seen["context_mib.high"]["changes"]) == (360, False)
    assert "**A pretend card**" in said
    rows = [line.split("|")[2:8] for line in said.splitlines()
            if line.startswith("| b-qwen2-vl-2b-turbomind-plan | vision_forward")]  # fmt: skip
    forecast, rehearsed, measured = (float(cell.replace(",", "")) for cell in rows[0][1:4])
    assert abs(forecast - rehearsed) <= 0.02 * forecast
    assert measured < rehearsed
