"""``turbofit tune`` end to end, with a stand-in for the engine; in --all with LMDeploy's own."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.support.cloud import STAND_IN
from tests.support.processes import Child, free_port
from tests.support.serving import needs, start_turbofit
from turbofit.cli.main import main
from turbofit.core.tuning import SpeedFigures, Tuning
from turbofit.planning.tuned import keep_tuned

pytestmark = [pytest.mark.lmdeploy]
needs("lmdeploy", "fastapi", "torchvision")

ONE = (
    "internvl2-1b", "--on", "1xrtx3090", "--engine", "turbomind", "--pretend", "--concurrency", "2",
    "--clock", "0", "--requests", "6", "--output-tokens", "4", "--prompt-tokens", "16",
    "--image-size", "448x448",
)  # fmt: skip


ONE_MACHINE = ("internvl2-8b", "--on", "1xrtx3090")
UNTIMED = ("internvl2-8b", "--on", "1xv100-32g", "--pretend")
FULL = ("internvl2-8b", "--on", "1xrtx3090:free=8GiB", "--pretend")
DRAFTED = (
    "qwen3.5-9b", "--on", "1xa100-40g", "--pretend", "--speculative-algorithm", "qwen3_5_mtp",
    "--drafts", "0,1",
)  # fmt: skip
FALLBACK = ("qwen2.5-vl-3b", "--engine", "transformers", "--on", "1xrtx3090", "--pretend")


def tune(
    children: list[Child], state: Path, *words: str, code: int = 0, **environ: str
) -> tuple[Child, Any]:
    """A tuning that has ended, and its document; no engine is left of it."""
    child = start_turbofit(children, state, "tune", *ONE, *words, "--json", **environ)
    if code:
        child.wait_for("trial 2: turbomind")
        child.wait_for("engine: phase: ready")
        child.process.send_signal(signal.SIGINT)
    assert child.finish() == code, child.stderr
    assert child.process.stdout is not None
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mine = str(state).encode() in (folder / "environ").read_bytes()
            assert int(folder.name) == os.getpid() or not mine
    return child, json.loads(child.process.stdout.read())


def test_without_a_clock_its_settings_start_and_no_speed_is_told(
    children, tmp_path, monkeypatch
) -> None:
    child, result = tune(children, tmp_path, "--starts", "1", **STAND_IN)
    assert [one["outcome"] for one in result["trials"]] == ["started"]
    assert result["trials"][0]["measured"] is result["best"] is None
    assert "not kept" not in child.stderr
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = msgspec.convert(result, Tuning)
    figures = dict.fromkeys(SpeedFigures.__struct_fields__, 1)
    measured = SpeedFigures(**{**figures, "turns": ()})
    trial = replace(found.trials[0], outcome="measured", measured=measured, meets_slo=True)
    keep_tuned(replace(found, best=1, trials=(trial,)))
    serve_begins_with_the_best(children, tmp_path, **STAND_IN)


def serve_begins_with_the_best(children: list[Child], tmp_path: Path, **environ: str) -> None:
    words = (*ONE[:6], "--no-standby", "--port", str(free_port()))
    served = start_turbofit(children, tmp_path, "serve", *words, **environ)
    served.wait_for("engine: phase: starting")
    served.process.send_signal(signal.SIGTERM)
    assert served.finish() == 0
    plans = (tmp_path / "turbofit" / "runs").glob("*/plan.json")
    newest = max(plans, key=lambda path: path.stat().st_mtime)
    reasons = json.loads(newest.read_text())["reasons"]
    assert any(one.startswith("tuned: ") for one in reasons)


@pytest.mark.parametrize(
    ("command", "words", "code", "text"),
    [
        ("tune", ONE_MACHINE, 2, "tune measures the machine here"),
        ("tune", (*ONE_MACHINE, "--clock", "2"), 2, "--clock is the time of pretend GPUs"),
        ("tune", (*ONE, "--slo", "ttft"), 2, "no limit"),
        ("tune", (*ONE, "--time", "20GiB"), 2, "--time '20GiB' is no time"),
        ("tune", (*ONE, "--slo", "ttft=2s"), 2, "no answer with --clock 0"),
        ("tune", (*UNTIMED, "--slo", "ttft=2s"), 2, "nobody knows how fast InternVL2-8B"),
        ("tune", (*ONE, "--budget", "1GiB"), 3, "does not fit"),
        ("tune", (*ONE, "--goal", "context"), 2, "does not measure context"),
        ("tune", (*ONE, "--kv-types", "7"), 2, "no list of KV types"),
        ("tune", (*ONE, "--drafts", "a,b"), 2, "no list of numbers"),
        ("tune", (*ONE, "--drafts", "0,1"), 2, "none is given"),
        ("tune", (*DRAFTED, "--speculative-num-draft-tokens", "2"), 2, "are one setting"),
        ("tune", DRAFTED, 2, "accept no token"),
        ("tune", (*ONE, "--rate", "3"), 2, "do not go together"),
        ("tune", FULL, 3, "does not fit"),
        ("tune", FALLBACK, 2, "planned for Transformers"),
        ("calibrate", ONE_MACHINE, 2, "calibrate measures the machine here"),
        ("calibrate", (*ONE_MACHINE, "--pretend", "--minutes", "0"), 2, "more than 0"),
        ("calibrate", FULL, 3, "does not fit"),
    ],
)
def test_wrong_use_is_said(command, words, code, text, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path))
    assert main([command, *words]) == code
    told = capsys.readouterr().err
    assert text in told
    assert "Traceback" not in told
