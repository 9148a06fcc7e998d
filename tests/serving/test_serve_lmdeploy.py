"""``turbofit serve`` end to end: real NVML bindings, real LMDeploy server, stand-in engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvml import Process, Scenario, gpu_3090
from tests.support.processes import REPO, Child, gone, pids
from tests.support.serving import Served
from turbofit.core.plan import Plan
from turbofit.core.units import GIB

pytestmark = pytest.mark.lmdeploy


@pytest.fixture
def serve(tmp_path: Path, port: int, children: list[Child], nvml_machine: Any):
    """Start ``turbofit serve`` on a machine with so many RTX 3090s."""

    def run(*words: str, scenario: Scenario | None = None, **environ: str) -> Child:
        options = ["--no-rehearse", "--no-standby", "--port", str(port)]
        child = Child(
            [sys.executable, "-m", "turbofit", "serve", *options, *words],
            XDG_STATE_HOME=str(tmp_path / "state"), TURBOFIT_LEASES=str(tmp_path / "leases"),
            STANDIN_DUMP=str(tmp_path / "config.json"),
            **nvml_machine(scenario or Scenario(gpus=[gpu_3090(0)])), **environ,
        )  # fmt: skip
        children.append(child)
        return child

    return run


def test_internvl2_from_measuring_to_the_end(serve, internvl2, tmp_path, port) -> None:
    pytest.importorskip("openai")
    child = serve(str(internvl2), "--concurrency", "3", "--model-name", "it's mine")
    served = Served(child, port, tmp_path / "state")
    child.wait_for("ready at ")
    assert child.process.stdout is not None
    assert child.process.stdout.readline() == f"{served.url}\n"
    assert "phase: check" in child.stderr
    plan = Plan.from_json((served.run / "plan.json").read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    planned = plan.engines[0].lmdeploy_settings()
    assert {name: config[name] for name in planned} == planned
    assert plan.engines[0].settings.max_batch_size == 3
    assert f"(forecast {plan.engines[0].kv.tokens:,}" in child.stderr
    assert ask_as_told(child) == "ok"
    # Names are listed first, and a folder where the name of its model stands beside them.
    listed = [one["id"] for one in served.ask("/v1/models")[2]["data"]]
    assert listed[:2] == ["it's mine", str(internvl2)]
    for name in {"it's mine", "InternVL2-tiny", *listed}:
        body = {"model": name, "prompt": "a", "max_tokens": 1}
        assert served.ask("/v1/completions", body)[2]["choices"]
    child.process.send_signal(signal.SIGTERM)
    assert child.finish() == 0
    assert all(gone(pid) for pid in pids(child))
    assert child.process.stdout.read() == ""
    assert "the GPUs' memory is back" in child.stderr
    assert "in use after the check" in child.stderr
    assert "--port" not in child.stderr
    assert "Traceback" not in (served.run / "engine-0.log").read_text()


def ask_as_told(child: Child) -> str | None:
    """Ask OpenAI's API as the server says that one does; the answer."""
    import openai

    told = re.search(r"OpenAI's API at (\S+/v1), model (.+)$", child.stderr, re.MULTILINE)
    assert told
    client = openai.OpenAI(base_url=told[1], api_key="none")
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model=told[2], messages=messages, max_tokens=5)
    return answer.choices[0].message.content


def test_a_saved_plan_and_somebody_who_took_its_memory(
    serve: Any, internvl2: Path, tmp_path: Path, nvml_machine: Any
) -> None:
    scenario = Scenario(gpus=[gpu_3090(0)])
    planned = subprocess.run(
        [sys.executable, "-m", "turbofit", "plan", str(internvl2), "--json"],
        cwd=REPO, env={**os.environ, **nvml_machine(scenario)}, capture_output=True, text=True,
        check=True,
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
