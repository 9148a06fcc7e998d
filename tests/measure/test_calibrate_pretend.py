"""``turbofit calibrate`` end to end: LMDeploy's real server and engine on pretend GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.pretend.cuda_torch import CUDA_PATH, ROOT
from tests.support.processes import sharing_libraries
from tests.support.serving import needs, start_turbofit
from turbofit.model.source import resolve_model
from turbofit.rehearsal.checkpoint.twin import checkpoint_for

#: What each step reads, what plans learn of it, and how it is forgotten: `test_calibrate`,
#: `serving/test_calibration`; that the engine takes what is forecast: `test_serve_pretend`; that a
#: run on pretend GPUs is not shared: `report/test_share`, `bench/test_gpu`.
pytestmark = [pytest.mark.lmdeploy, pytest.mark.exhaustive]
needs("lmdeploy", "fastapi", "torchvision")

EIGHT = ("internvl2-8b", "--on", "1xrtx3090", "--pretend")


def test_it_measures_also_after_a_calibration_that_was_cut_short(children, tmp_path) -> None:
    first = start_turbofit(children, tmp_path, "calibrate", *EIGHT)
    first.wait_for("engine: kernels: GPU 0")
    first.process.send_signal(signal.SIGINT)
    assert first.finish() == 130
    assert "stopped: nothing was learned" in first.stderr
    second = start_turbofit(children, tmp_path, "calibrate", *EIGHT, "--json")
    assert second.finish() == 0, second.stderr
    assert second.process.stdout is not None
    result = json.loads(second.process.stdout.read())
    (learned,) = result["calibrations"]
    assert learned["pretend"] is True
    # The pretend card is charged with the estimates, so that nothing is left to learn but rounding.
    assert abs(learned["context"]) <= 2 << 20
    # A step of the cache, which the next one may be larger by, and rounding.
    assert 0 <= learned["buffers"] <= 36 << 20
    over = {row["phase"]: row["over"] / (1 << 20) for row in result["phases"]}
    assert {"context and weights", "cache", "steady", "kernels", "sampling"} <= set(over)
    assert all(0 <= size <= 4 for size in over.values()), over


@pytest.mark.skipif(not CUDA_PATH, reason="no CUDA build of torch")
def test_under_a_pretend_driver_it_runs_as_on_a_real_one_and_is_kept_apart(tmp_path: Path) -> None:
    """NVML, fetch, leases and the memory that comes back, as on a real card."""
    model = resolve_model("qwen2-vl-2b")
    checkpoint = checkpoint_for(model, tmp_path / model.name)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "turbofit", "pretend", "--on", "1xrtx3090", "--",
             sys.executable, "-m", "turbofit", *words],
            env={**os.environ, "PYTHONPATH": f"{CUDA_PATH}:{ROOT}",
                 "XDG_STATE_HOME": sharing_libraries(tmp_path),
                 "TURBOFIT_LEASES": str(tmp_path / "leases")},
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    done = run("calibrate", str(checkpoint), "--engine", "turbomind", "--no-rehearse")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the GPUs' memory is back" in done.stderr
    folder = tmp_path / "turbofit"
    assert not list(folder.glob("learned/*/calibration-*"))
    (kept,) = folder.glob("learned-pretend/*/calibration-*")
    body = json.loads(kept.read_text())
    # The estimate pays 20 MiB for cuBLAS handles and 101 for torch's kernels: none is here.
    assert body["calibration"]["context"] == -121 << 20
    planned = run("plan", str(checkpoint), "--engine", "turbomind", "--json")
    assert planned.returncode == 0, planned.stderr[-2000:]
    plan = json.loads(planned.stdout[: planned.stdout.rindex("}") + 1])
    terms = {term["term"]: term for term in plan["engines"][0]["ledgers"][0]["terms"]}
    assert terms["calibration.context"]["bytes"] == -121 << 20
    assert terms["calibration.context"]["basis"] == "measured"
    assert any("on PRETEND GPUs" in reason for reason in plan["reasons"])
    before = json.loads((next((folder / "runs").iterdir()) / "plan.json").read_text())
    now, then = (one["engines"][0]["kv"]["tokens"] for one in (plan, before))
    assert now > then
