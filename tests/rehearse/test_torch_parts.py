"""The parts of a torch engine's rehearsal that need no torch: cases, records, ledger, outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turbofit.cli.main import main
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.images import PatchRule, TileRule
from turbofit.core.struct import decode, to_json
from turbofit.pretend.scenario import PretendGpu, Scenario
from turbofit.pretend.usage import read_timeline, read_usage
from turbofit.rehearse import packages
from turbofit.rehearse.spec import LONGEST, RehearsalCase, RehearsalRequest, Spec
from turbofit.rehearse.torch.phase_recorder import Phases, read_records
from turbofit.rehearse.torch.readings import _death, span
from turbofit.rehearse.torch.torch_image_overlap import rehearsed_size

TILES = TileRule(tile_size=448, tokens_per_tile=256, max_dynamic_patch=12)
PATCHES = PatchRule(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056)


# ---------------------------------------------------------------- the worst request


@pytest.mark.parametrize("limit", range(1, 13))
def test_a_picture_gives_as_many_tiles_as_any(limit: int) -> None:
    size = rehearsed_size(TILES, limit)
    seen = TILES.units(*size, limit)
    assert seen == TILES.worst_units(limit)
    # The engine is not told of the limit: the picture keeps to it by itself.
    assert TILES.units(*size) == seen


@pytest.mark.parametrize("pixels", [12845056, 1003520, 602112, 100352, 3136])
def test_a_picture_gives_nearly_as_many_patches_as_any(pixels: int) -> None:
    size = rehearsed_size(PATCHES, pixels)
    seen, worst = PATCHES.units(*size), PATCHES.worst_units(pixels)
    assert 0.97 * worst <= seen <= worst


def test_qwen2_vls_worst_picture_is_a_square() -> None:
    assert rehearsed_size(PATCHES, None) == (3584, 3584)


def test_a_limit_above_the_checkpoints_own_is_refused() -> None:
    with pytest.raises(UsageError, match="checkpoint's own 12"):
        rehearsed_size(TILES, 24)


def test_a_specification_survives_its_text() -> None:
    request = RehearsalRequest(LONGEST, sizes=((448, 896),), images=3)
    spec = Spec(
        Scenario((PretendGpu("x", 1 << 30),), peers=frozenset({(0, 1)})),
        "somewhere",
        "pytorch",
        {"tp": 2},
        (RehearsalCase("a", (request,)),),
    )
    assert decode(to_json(spec), Spec, what="spec") == spec


# ---------------------------------------------------------------- records and ledger


def test_a_phase_waits_for_living_processes_only(tmp_path: Path) -> None:
    phases = Phases(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"pid": gone.pid, "number": 0, "rows": [{"phase": "build", "gpu": 0}]}
    (tmp_path / "records" / "1.json").write_text(json.dumps(record))
    phases.enter("build  model")
    assert (tmp_path / "phase").read_text() == "1 build model"
    assert read_records(tmp_path) == [record]


def timeline(folder: Path, pid: int, *lines: str) -> None:
    head = [f"I {pid} 1 0", f"N python worker{pid}"]
    (folder / f"{pid}.timeline").write_text("\n".join([*head, *lines]) + "\n")


def test_what_processes_hold_together(tmp_path: Path) -> None:
    timeline(
        tmp_path, 10,
        "K 0 300 900",
        "A 0 0 0 5 5 aa", "P build", "A 0 0 0 20 25 bb", "F bb 5", "P ready", "A 0 3 0 99 5 cc",
        "P case x", "A 0 0 0 7 12 dd", "F dd 5",
    )  # fmt: skip
    timeline(tmp_path, 11, "K 0 200 600")  # never marked: a context and no more
    held = [read_usage(read_timeline(path)) for path in sorted(tmp_path.glob("*.timeline"))]

    def together(phase: str) -> tuple[int, int]:
        spans = [span(usage, 0, phase, order) for usage in held]
        return sum(peak for peak, _ in spans), sum(end for _, end in spans)

    order = ["import", "build", "ready", "case x"]
    assert [span(held[0], 0, name, order)[0] - 300 for name in order] == [0, 25, 5, 12]
    assert together("build") == (525, 505)
    assert together("case x")[0] == 512
    # A phase in which a process was not marked: what it held after the one before.
    assert span(held[0], 0, "later", [*order, "later"])[1] == 305


# ---------------------------------------------------------------- death

OOM = "CUDA out of memory. Tried to allocate 640.00 MiB. GPU 0 has a total capacity of 23.70 GiB"


def death(log: str, **told: Any) -> dict[str, Any]:
    shared = SimpleNamespace(
        processes=(), peak=(0,) * 16, pinned_peak=0, allocations=0, pinned_allocations=0
    )
    scenario = SimpleNamespace(gpus=(), context=0)
    ran = SimpleNamespace(
        code=0, shared=shared, scenario=scenario, usages=(), command=(), exit_code=0, seconds=1
    )
    ended: Any = SimpleNamespace(ran=ran, notes=told, log=log.splitlines())
    return _death(ended)


def test_a_death_in_a_request_is_told_in_torchs_words() -> None:
    log = f"""Traceback (most recent call last):
  File "/x/site-packages/torch/nn/modules/module.py", line 1, in _call_impl
  File "/x/site-packages/lmdeploy/pytorch/models/qwen2_vl.py", line 483, in forward
  File "/x/site-packages/lmdeploy/pytorch/models/qwen2_vl.py", line 449, in forward
  File "/x/site-packages/torch/_ops.py", line 871, in __call__
torch.OutOfMemoryError: {OOM}
later lines"""
    found = death(log, cases=[{"name": "vision", "statuses": {"unavailable": 1}}])
    assert found["refused"]["phase"] == "case vision"
    assert found["message"] == OOM
    assert found["where"] == (
        "lmdeploy/pytorch/models/qwen2_vl.py:449 forward"
        " < lmdeploy/pytorch/models/qwen2_vl.py:483 forward"
    )


@pytest.mark.parametrize(
    ("kind", "message", "phase", "refused"),
    [
        ("OutOfMemoryError", OOM, "build", True),
        ("RuntimeError", "No enough gpu memory for kv cache.", "sizing", True),
        ("AssertionError", "num_key_value_heads % tp", "build", False),
        ("ValueError", "no such thing", "case x", False),
    ],
)
def test_a_death_before_any_request(kind: str, message: str, phase: str, refused: bool) -> None:
    error = {"type": kind, "message": message, "phase": phase, "frames": ["a.py:1 f"]}
    found = death(f"{kind}: {message}", error=error, phase="end")
    assert (found["refused"] is not None) == refused
    assert found["phase"] == phase
    assert message in found["message"]


# ---------------------------------------------------------------- wrong use


def test_torch_without_cuda_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "cuda_site", lambda: None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: object())
    words = ["rehearse", "qwen2-vl-2b", "--engine", "pytorch", "--on", "1xrtx3090"]
    assert main(words) == 7
    error = capsys.readouterr().err.splitlines()
    assert error[-2] == (
        "error: this Python's torch is no CUDA build, which rehearsing pytorch runs"
    )
    assert error[-1].startswith("hint: install torch")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda name: None if name == "ray" else object()
    )
    with pytest.raises(PackageError, match="ray is not installed"):
        packages.need_packages("pytorch", ray=True)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--engine", "pytorch", "--communicator", "nccl"], "--communicator"),
        (["--engine", "transformers", "--cache-max-entry-count", "0.5"], "--cache-max-entry-count"),
        (
            ["--engine", "turbomind", "--eager-mode"],
            "--eager-mode is no option of the turbomind engine",
        ),
        (["--engine", "pytorch", "--tp", "2"], "--tp 2 needs 2 equal GPUs"),
    ],
)
def test_options_that_mean_nothing_here(
    words: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rehearse", "qwen2-vl-2b", "--on", "1xrtx3090", *words]) == 2
    assert cause in capsys.readouterr().err


def test_the_parent_imports_neither_torch_nor_lmdeploy() -> None:
    code = (
        "import sys; import turbofit.rehearse.confirm; "
        "print(sorted({'torch', 'lmdeploy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
