"""What a trial of bench/gpu says of one that was ended, died early or was started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.gpu import acts, kept, trial, worst
from bench.gpu.load import Load
from turbofit import api
from turbofit.core.machine import Holder
from turbofit.launch.engine.engine_exit import EndedError
from turbofit.observe.ends import End

PLAN = api.plan("internvl2-8b", on="1xrtx3090", engine="turbomind")
POPEN = subprocess.Popen


class Installed:
    version, argv = "0.18.0", ("lmdeploy",)


def start(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Stand in for an engine: ``act(run, stop)``."""

    class Start:
        def __init__(self, run: Any, plan: Any, number: int) -> None:
            self._run = run

        def run(self, stop: Any, stack: Any) -> Any:
            act(self._run, stop)
            return stop.signal

    monkeypatch.setattr(trial, "Start", Start)
    monkeypatch.setattr(trial, "find_lmdeploy", Installed)


def outcome(tmp_path: Path, load: Load | None = None) -> tuple[str, dict[str, Any]]:
    out = trial.Out(tmp_path / "one.out.json")
    return trial.run(PLAN, out, load), out.facts


def test_a_trial_that_is_ended_from_outside_did_not_survive(tmp_path: Path, monkeypatch) -> None:
    for name in ("XDG_STATE_HOME", "TURBOFIT_LEASES"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def ended(run: Any, stop: Any) -> None:
        stop.signal = signal.SIGTERM

    start(monkeypatch, ended)
    assert outcome(tmp_path)[0] == "out_of_time"

    def ended_while_it_was_driven(run: Any, stop: Any) -> None:
        stop.signal = signal.SIGTERM
        run.on_open(["http://127.0.0.1:1"])

    start(monkeypatch, ended_while_it_was_driven)
    assert outcome(tmp_path)[0] == "out_of_time"
    start(monkeypatch, lambda run, stop: run.on_open(["http://127.0.0.1:1"]))
    said, facts = outcome(tmp_path)
    assert (said, facts["outcome"], facts["restarts"]) == ("survived", "survived", [])


def test_restarts_are_allowed_and_told(tmp_path: Path, monkeypatch) -> None:
    for name in ("XDG_STATE_HOME", "TURBOFIT_LEASES"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def raced(run: Any, stop: Any) -> None:
        assert run.config.timing.restarts == 5
        run.on_death("engine: its two processes lost each other")
        run.on_open(["http://127.0.0.1:1"])

    start(monkeypatch, raced)
    said, facts = outcome(tmp_path)
    assert said == "survived"
    assert facts["restarts"] == ["engine: its two processes lost each other"]

    def ran_out(run: Any, stop: Any) -> None:
        raise EndedError(End(kind="out_of_memory", message="no memory"))

    start(monkeypatch, ran_out)
    assert outcome(tmp_path)[0] == "died"


def command(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Stand in for the trial's program."""

    def popen(words: list[str], **more: Any) -> Any:
        return POPEN([sys.executable, "-c", program, *words[3:]], **more)

    monkeypatch.setattr(acts.subprocess, "Popen", popen)


def test_a_trial_that_wrote_nothing_or_was_late_is_no_result(tmp_path: Path, monkeypatch) -> None:
    command(monkeypatch, "raise SystemExit('no such thing')")
    seen = acts.trial(PLAN, "a", tmp_path, 120.0, os.environ)
    assert (seen["outcome"], seen["code"], seen["said"]) == ("failed", 1, ["no such thing"])
    wrote = """
import json, signal, sys, threading
out = sys.argv[2]
def ended(*_):
    json.dump({"outcome": "failed", "why": "SIGTERM"}, open(out, "w"))
    sys.exit(1)
signal.signal(signal.SIGTERM, ended)
json.dump({"outcome": "running", "phases": []}, open(out, "w"))
threading.Event().wait()
"""
    command(monkeypatch, wrote)
    seen = acts.trial(PLAN, "b", tmp_path, 2.0, os.environ)
    assert seen["outcome"] == "out_of_time"
    assert seen["code"] != 0
    command(monkeypatch, "import sys; open(sys.argv[2], 'w').write('{\"outcome\": \"survived\"}')")
    seen = acts.trial(PLAN, "c", tmp_path, 120.0, os.environ)
    assert (seen["outcome"], seen["code"]) == ("survived", 0)


def test_a_trials_plan_and_logs_are_kept_without_what_is_of_the_machine(
    tmp_path: Path, monkeypatch
) -> None:
    wrote = """
import pathlib, sys
plan, out = map(pathlib.Path, sys.argv[1:3])
folder = out.with_suffix(".run")
folder.mkdir()
(folder / "engine-0.log").write_text(f"{plan}\\n" + "x" * 3_000_000 + "the end")
out.write_text('{"outcome": "died"}')
"""
    command(monkeypatch, wrote)
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    out.mkdir()
    gpu = replace(
        PLAN.machine.gpus[0], uuid="GPU-a-b-c", holders=(Holder(pid=1, name="somebody", bytes=2),)
    )
    plan = replace(PLAN, machine=replace(PLAN.machine, gpus=(gpu,)))
    acts.trial(plan, "b-x", scratch, 120.0, os.environ, out=out)
    kept_plan, log = kept.plan_of(out, "b-x"), kept.engine_log(out, "b-x")
    assert kept_plan is not None
    assert kept_plan.settings == PLAN.settings
    assert (kept_plan.machine.gpus[0].uuid, kept_plan.machine.gpus[0].holders) == ("GPU-0", ())
    assert log is not None
    assert log.startswith("SCRATCH/b-x.plan.json\n")
    assert log.endswith("xthe end")
    assert "bytes are left out here" in log
    assert len(log) < 1_100_000
    assert (out / "logs" / "b-x.tar.gz").stat().st_size < 1 << 20
    assert kept.plan_of(out, "b-y") is None


def test_a_rehearsal_is_bounded(tmp_path: Path, monkeypatch) -> None:
    command(monkeypatch, "import threading; threading.Event().wait()")
    seen = acts.rehearsed(PLAN, "a", tmp_path, 0.5, os.environ)
    assert seen == {"not_rehearsed": "its time was over"}
    command(monkeypatch, "import sys; sys.exit('no C compiler')")
    assert (
        acts.rehearsed(PLAN, "a", tmp_path, 120.0, os.environ)["not_rehearsed"] == "no C compiler"
    )


def test_worst_cases_have_a_size_at_which_they_end_in_time() -> None:
    def make(on: str) -> Any:
        return lambda **limits: api.plan("qwen2-vl-7b", on=on, engine="turbomind", **limits)

    large = worst.sized(make("1xh200"), worst.sizes("qwen2-vl-7b"), 1000)
    # 65,536 patches are 1.6 s each, most of it the tower's attention.
    assert 1.0 < worst.request_seconds(make("1xh200")()) < 3.0
    assert large.requests == 1000
    assert 0 < large.seconds <= worst.SECONDS
    assert large.limit["max_pixels"] >= 196 * 8192
    assert large.plan.limits.units_per_request < 65536
    small = worst.sized(make("1xrtx3090"), worst.sizes("qwen2-vl-7b"), 1000)
    assert small.limit["max_pixels"] == 196 * 4096
    assert 1 <= small.requests < 1000
    assert small.seconds <= worst.SECONDS
    few = worst.sized(make("1xh200"), worst.sizes("qwen2-vl-7b"), 100)
    assert (few.limit, few.requests) == ({}, 100)
