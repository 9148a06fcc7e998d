"""``turbofit serve`` end to end: real NVML bindings, real LMDeploy server, stand-in engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvml import Process, Scenario, gpu_3090
from tests.support.processes import REPO, Child, gone, pids
from tests.support.waiting import HANG
from turbofit.core.plan import Plan
from turbofit.core.units import GIB

pytestmark = pytest.mark.lmdeploy


@pytest.fixture
def serve(tmp_path: Path, port: int, children: list[Child], nvml_machine: Any):
    """Start ``turbofit serve`` on a machine with so many RTX 3090s."""

    def run(*words: str, scenario: Scenario | None = None, **environ: str) -> Child:
        machine = nvml_machine(scenario or Scenario(gpus=[gpu_3090(0)]))
        child = Child(
            [
                sys.executable, "-m", "turbofit", "serve", "--no-rehearse", "--port", str(port),
                *words,
            ],
            XDG_STATE_HOME=str(tmp_path / "state"),
            TURBOFIT_LEASES=str(tmp_path / "leases"),
            STANDIN_DUMP=str(tmp_path / "config.json"),
            **machine,
            **environ,
        )  # fmt: skip
        children.append(child)
        return child

    return run


def the_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "state" / "turbofit" / "runs").iterdir()
    return folder


def ask(port: int, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=HANG) as answer:
        return json.load(answer)


def test_internvl2_from_measuring_to_the_end(
    serve: Any, internvl2: Path, tmp_path: Path, port: int
) -> None:
    pytest.importorskip("openai")
    child = serve(str(internvl2), "--concurrency", "3", "--model-name", "it's mine")
    assert child.process.stdout is not None
    child.wait_for("to ask: ", 2)
    assert child.process.stdout.readline() == f"http://127.0.0.1:{port}\n"
    assert "phase: check" in child.stderr
    plan = Plan.from_json((the_run(tmp_path) / "plan.json").read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    planned = plan.lmdeploy_settings()
    assert {name: config[name] for name in planned} == planned
    assert plan.settings.max_batch_size == 3
    assert f"(forecast {plan.kv.tokens:,}" in child.stderr
    assert ask_as_told(child) == ["ok", "ok"]
    names_are_answered(port, ["it's mine", "InternVL2-tiny"], str(internvl2))
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 0
    assert all(gone(pid) for pid in pids(child))
    assert child.process.stdout.read() == ""
    assert "the GPUs' memory is back" in child.stderr
    assert "in use after the check" in child.stderr
    assert "--port" not in child.stderr
    assert "Traceback" not in (the_run(tmp_path) / "engine-0.log").read_text()


def ask_as_told(child: Child) -> list[str]:
    """Do what the server says that one does to ask it; what each of the answers says."""
    lines = [line.partition("to ask: ")[2] for line in child.stderr.splitlines()]
    shell, python = (line for line in lines if line)
    script = f"import os, openai\nprint({python}.model_dump_json())"
    answers = []
    for words in (["bash", "-c", shell], [sys.executable, "-c", script]):
        done = subprocess.run(
            words, env={**os.environ, "API_KEY": "secret"}, capture_output=True, text=True,
            check=True, timeout=HANG,
        )  # fmt: skip
        answers.append(json.loads(done.stdout)["choices"][0]["message"]["content"])
    return answers


def names_are_answered(port: int, names: list[str], folder: str) -> None:
    """Names that are listed first, and a folder where the name of its model stands beside them."""
    listed = [one["id"] for one in ask(port, "/v1/models")["data"]]
    assert listed[: len(names)] == names[:1] + [folder] * (len(names) > 1)
    for name in {*names, *listed}:
        body = {"model": name, "prompt": "a", "max_tokens": 1}
        assert ask(port, "/v1/completions", body)["choices"]


def test_a_saved_plan_and_somebody_who_took_its_memory(
    serve: Any, internvl2: Path, tmp_path: Path, nvml_machine: Any
) -> None:
    scenario = Scenario(gpus=[gpu_3090(0)])
    environ = nvml_machine(scenario)

    planned = subprocess.run(
        [sys.executable, "-m", "turbofit", "plan", str(internvl2), "--json"],
        cwd=REPO, env={**os.environ, **environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    saved = tmp_path / "plan.json"
    saved.write_text(planned.stdout)
    scenario.gpus[0].used += 3 * GIB
    scenario.gpus[0].compute.append(Process(4711, 3 * GIB, "python3"))
    child = serve("--plan", str(saved), scenario=scenario)
    assert child.finish() == 3
    assert "python3[4711] took 3.0 GiB on GPU 0" in child.stderr
    assert not (tmp_path / "config.json").exists()


def test_rank_launchers_are_refused(serve: Any, internvl2: Path) -> None:
    scenario = Scenario(gpus=[gpu_3090(0), gpu_3090(1)])
    child = serve(str(internvl2), "--tp", "2", scenario=scenario, WORLD_SIZE="4", LOCAL_RANK="0")
    assert child.finish() == 5
    assert "4 whole engines" in child.stderr


