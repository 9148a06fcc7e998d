"""``turbofit tune`` end to end: LMDeploy's real server and engine on pretend GPUs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Child
from tests.support.serving import needs, start_turbofit
from tests.support.waiting import until
from turbofit.cli.main import main

pytestmark = [pytest.mark.lmdeploy]
needs("lmdeploy", "fastapi", "torchvision")

ONE = (
    "internvl2-1b", "--on", "1xrtx3090", "--engine", "turbomind", "--pretend", "--concurrency", "2",
    "--requests", "6", "--output-tokens", "4", "--prompt-tokens", "16", "--image-size", "448x448",
)  # fmt: skip


def tune(children: list[Child], state: Path, *words: str, command: str = "tune") -> Child:
    return start_turbofit(children, state, command, *words)


def said(child: Child) -> Any:
    assert child.process.stdout is not None
    return json.loads(child.process.stdout.read())


def engines(state: Path) -> list[str]:
    """Command lines of processes that were started under this state folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environ = (entry / "environ").read_bytes()
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if (
            entry.name.isdigit()
            and int(entry.name) != os.getpid()
            and f"{state}".encode() in environ
        ):
            found.append(words.decode(errors="replace"))
    return found


@pytest.mark.slow
def test_it_tries_keeps_the_best_and_serve_uses_it(children: list[Child], tmp_path: Path) -> None:
    first = tune(children, tmp_path, *ONE, "--starts", "1", "--json")
    assert first.finish() == 0, first.stderr
    result = said(first)
    assert [one["outcome"] for one in result["trials"]] == ["measured"]
    assert result["trials"][0]["measured"]["failed"] == 0
    assert engines(tmp_path) == []
    serve_begins_with_the_best(children, tmp_path)


@pytest.mark.exhaustive
def test_it_tries_stops_tries_again_keeps_the_best_and_serve_uses_it(
    children: list[Child], tmp_path: Path
) -> None:
    first = tune(children, tmp_path, *ONE, "--starts", "3", "--json")
    first.wait_for("trial 2: turbomind")
    first.wait_for("engine: phase: ready")
    first.process.send_signal(signal.SIGINT)
    assert first.finish() == 130
    assert engines(tmp_path) == []
    part = said(first)
    assert ([one["outcome"] for one in part["trials"]], part["best"]) == (["measured"], 1)
    assert part["stopped"] == "SIGINT"
    second = tune(children, tmp_path, *ONE, "--starts", "2", "--again", "--json")
    assert second.finish() == 0, second.stderr
    result = said(second)
    assert [one["outcome"] for one in result["trials"]] == ["measured", "measured"]
    assert all(one["measured"]["failed"] == 0 for one in result["trials"])
    assert result["best"] in (1, 2)
    assert engines(tmp_path) == []
    assert not (tmp_path / "turbofit" / "tuned").exists()
    third = tune(children, tmp_path, *ONE, "--json")
    assert third.finish() == 0
    assert "tuned before" in third.stderr
    assert said(third) == result
    serve_begins_with_the_best(children, tmp_path)


def serve_begins_with_the_best(children: list[Child], tmp_path: Path) -> None:
    served = tune(children, tmp_path, *ONE[:6], "--port", "23731", command="serve")
    served.wait_for("engine: phase: starting")
    served.process.send_signal(signal.SIGTERM)
    assert served.finish() == 0
    newest = max(
        (tmp_path / "turbofit" / "runs").glob("*/plan.json"), key=lambda p: p.stat().st_mtime
    )
    reasons = json.loads(newest.read_text())["reasons"]
    assert any(one.startswith("tuned: ") for one in reasons)


@pytest.mark.exhaustive
def test_tune_ends_its_own_load_without_a_traceback(
    children: list[Child], tmp_path: Path, internvl2: Path
) -> None:
    child = tune(
        children, tmp_path, str(internvl2), "--on", "1xrtx3060", "--context", "8192", "--pretend",
        "--requests", "100000", "--output-tokens", "2000", "--prompt-tokens", "16", "--starts", "1",
        "--images", "0",
    )  # fmt: skip
    child.wait_for("phase: ready")
    (log,) = (tmp_path / "turbofit" / "runs").glob("*/engine-0.log")
    checks = log.read_text().count(" resume ")
    until(lambda: log.read_text().count(" resume ") > checks + 8, "the load")
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 130  # there is no answer
    assert "Traceback" not in child.stderr
    assert "Traceback" not in log.read_text()


def test_wrong_use_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBOFIT_LEASES", str(tmp_path))
    for words, code, text in (
        (("internvl2-8b", "--on", "1xrtx3090"), 2, "tune measures the machine here"),
        ((*ONE, "--slo", "ttft"), 2, "no limit"),
        ((*ONE, "--time", "20GiB"), 2, "--time '20GiB' is no time"),
        ((*ONE, "--budget", "lots"), 2, "--budget 'lots' is not a size"),
        ((*ONE, "--budget", "1GiB"), 3, "does not fit"),
        ((*ONE, "--goal", "context"), 2, "does not measure context"),
        ((*ONE, "--kv-types", "7"), 2, "no list of KV types"),
        ((*ONE, "--rate", "3"), 2, "do not go together"),
        (("internvl2-8b", "--on", "1xrtx3090:free=8GiB", "--pretend"), 3, "does not fit"),
        (("llava-onevision-7b", "--on", "1xrtx3090", "--pretend"), 2, "planned for Transformers"),
    ):
        assert main(["tune", *words]) == code
        told = capsys.readouterr().err
        assert text in told
        assert "Traceback" not in told
